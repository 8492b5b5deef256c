"""A run that gets a stop signal saves before it ends, and one that is killed leaves nothing behind.

With the script's own defaults: data workers, overlap, torchrun, and an earlier checkpoint of the same run.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.training.tracking.records import read_run_record
from tests.distributed.launch import steps
from tests.distributed.user import ENDLESS, Run, step3, step3_forked, wait_for

STOPPED = 75


def settings(work: Path, name: str, **more: Any) -> dict[str, Any]:
    paths = {"DATASET_PATH": work / "pretrain", "LOAD_CHECKPOINT_PATH": work / "start"}
    sizes = {"SAVE_CHECKPOINT_PATH": work / name, "TRAIN_ITERS": ENDLESS, "SAVE_INTERVAL": 5, "GPUS": 2}
    return {**paths, **sizes, **more}


def log_of(work: Path, name: str) -> Path:
    return work / f"{name}.log"


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "launcher"), (signal.SIGINT, "launcher"), (signal.SIGHUP, "launcher"),
        (signal.SIGUSR1, "launcher"), (signal.SIGTERM, "rank"), (signal.SIGTERM, "everything"),
    ],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_a_signal_saves_and_stops_the_run(work: Path, number: signal.Signals, to: str) -> None:
    name = f"stop_{number.name}_{to}"
    run = Run(settings(work, name), log_of(work, name))
    run.wait_for("saved " + str(work / name / "iter_0000005"))
    targets = {"launcher": lambda: [run.process.pid], "rank": lambda: [run.ranks()[1].pid], "everything": run.processes}
    for pid in targets[to]():  # a scheduler may signal data workers and all
        os.kill(pid, number)
    log = run.end(STOPPED, 60)
    stopped = run.tracker()
    assert stopped > 5 and f"stop requested: saving iteration {stopped}" in log
    assert f"stopped and saved at iteration {stopped} of {ENDLESS}; the same command resumes from there" in log
    assert "Traceback" not in log
    again = step3_forked(settings(work, name, TRAIN_ITERS=stopped + 1))
    assert [iteration for iteration, _, _ in steps(again)] == [stopped + 1]


def test_a_second_interrupt_ends_the_run_at_once(work: Path) -> None:
    # So large a step that the first is not acted on within the test.
    run = Run(settings(work, "second", GLOBAL_BATCH_SIZE=400_000), log_of(work, "second"))
    run.wait_for("optimizer: ")
    wait_for(lambda: len(run.ranks()) == 2)
    run.process.send_signal(signal.SIGINT)
    run.wait_for("a second Ctrl-C or SIGTERM ends it")
    time.sleep(1)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    log = run.end(128 + signal.SIGINT, 20)
    assert (
        "SIGINT again: ended immediately" in log
        and not (work / "second" / "latest_checkpointed_iteration.txt").exists()
    )


def test_an_evaluation_does_not_delay_a_stop(work: Path) -> None:
    more = {"SPLIT": "50,50,0", "EVAL_INTERVAL": 6, "EVAL_ITERS": ENDLESS, "SEQ_LENGTH": 8}  # ten seconds of it
    run = Run(settings(work, "evaluating", **more), log_of(work, "evaluating"))
    run.wait_for("iteration 6/")
    run.process.send_signal(signal.SIGTERM)
    log = run.end(STOPPED, 60)
    assert "validation at iteration 6 interrupted: stop requested" in log and run.tracker() == 6


def test_exit_duration_min_counts_the_save(work: Path) -> None:
    began = time.time()
    log = step3(settings(work, "in_time", EXIT_DURATION_MIN=0.35), log_of(work, "in_time"), STOPPED)
    assert time.time() - began < 21 + 15  # the launcher's own end, on a busy machine
    assert "stop requested: saving iteration" in log


def test_a_hangup_is_ignored_under_nohup(work: Path) -> None:
    run = Run(settings(work, "nohup", TRAIN_ITERS=30), log_of(work, "nohup"), nohup=True)
    run.wait_for("iteration 6/")
    run.process.send_signal(signal.SIGHUP)
    assert "iteration 30/30" in run.end(0)


@pytest.mark.parametrize("what", ["launcher", "rank"])
def test_a_killed_process_ends_all_others_at_once(work: Path, what: str) -> None:
    name = f"killed_{what}"
    run = Run(settings(work, name), log_of(work, name))
    run.wait_for("saved " + str(work / name / "iter_0000005"))
    ranks, began = run.ranks(), time.monotonic()
    assert all(len(rank.children()) >= 4 for rank in ranks)  # two data workers each for training and validation
    if what == "launcher":
        run.kill()
    else:
        os.kill(ranks[1].pid, signal.SIGKILL)
        log = run.end(1, 20)
        reason = "rank 1 failed first, killed by SIGKILL: is the host out of memory (dmesg)?"
        assert reason in log and reason in (work / name / "log.txt").read_text(encoding="utf-8")
        (start,) = read_run_record(work / name)["starts"]
        assert start["end"]["reason"].endswith(reason) and start["end"]["iteration"] >= 5
    assert time.monotonic() - began < 10
    done = run.tracker()
    again = step3_forked(settings(work, name, TRAIN_ITERS=done + 1))
    assert [iteration for iteration, _, _ in steps(again)] == [done + 1]


def test_a_killed_run_is_restarted_by_max_restarts(work: Path) -> None:
    run = Run(settings(work, "restarted", MAX_RESTARTS=1, TRAIN_ITERS=30), log_of(work, "restarted"))
    run.wait_for("iteration 7/")
    os.kill(run.ranks()[0].pid, signal.SIGKILL)
    found = [iteration for iteration, _, _ in steps(run.end(0))]
    back = next(i for i in range(1, len(found)) if found[i] <= found[i - 1])
    assert found[back] % 5 == 1 and found[-1] == 30


def test_data_workers_and_writers_end_with_their_rank(work: Path) -> None:
    run = Run(settings(work, "orphans"), log_of(work, "orphans"))
    run.wait_for("iteration 3/")
    (rank, _) = run.ranks()
    children = rank.children(recursive=True)
    rank.kill()
    _, left = psutil.wait_procs(children, timeout=5)
    # The process that adopts an orphan may be slow to reap it.
    assert children and all(each.status() == psutil.STATUS_ZOMBIE for each in left if each.is_running())
    run.end(1, 30)
