"""A rank that hangs is named, with the stacks of the others, and the run is restarted."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from common.training.launching.hang_detector import WAITING_FOR_DATA, Beat, who_hangs
from common.training.tracking.records import read_metrics
from tests.distributed.launch import steps
from tests.distributed.user import ENDLESS, Run

pytestmark = pytest.mark.lane


def settings(work: Path, name: str, **more: Any) -> dict[str, Any]:
    paths = {"DATASET_PATH": work / "pretrain", "LOAD_CHECKPOINT_PATH": work / "start"}
    return {**paths, "SAVE_CHECKPOINT_PATH": work / name, "GPUS": 2, "SAVE_INTERVAL": 5, **more}


def test_a_rank_that_hangs_is_named_and_max_restarts_restarts_the_run(work: Path) -> None:
    # A tenth of a minute in place of eight: the test would wait for as long.
    given = settings(work, "hangs", HANG_TIMEOUT_MIN=0.1, MAX_RESTARTS=1, TRAIN_ITERS=40)
    run = Run(given, work / "hangs.log")
    run.wait_for("iteration 7/")
    os.kill(run.ranks()[1].pid, signal.SIGSTOP)
    log = run.end(0, 120)
    assert "error: HANG_TIMEOUT_MIN=0.1: rank 1 does not respond" in log
    assert re.search(r"rank 0: no progress for \d+ s after iteration \d+, .*; its stack:", log)
    assert re.search(r"trainer\.py.* in step$", log, re.MULTILINE)  # rank 0's stack
    assert steps(log)[-1][0] == 40


def test_a_long_step_is_no_hang(work: Path) -> None:
    # Each micro-batch is progress; the full step takes longer than the limit of 3 s. Pipeline stages keep in step
    # with each other; data-parallel ranks drift apart on a busy machine and the faster one waits at the end.
    sizes = {"PP": 2, "MICRO_BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 600, "TRAIN_ITERS": 1, "EVAL_INTERVAL": 0}
    given = settings(work, "long", HANG_TIMEOUT_MIN=0.05, **sizes)
    Run(given, work / "long.log").end(0, 240)
    (line,) = (each for each in read_metrics(work / "long") if "loss" in each)
    assert line["ms_per_iteration"] > 3_000


def test_the_rank_with_the_least_progress_is_the_one_that_hangs() -> None:
    ahead, late = Beat(57, 400, "the optimizer's step", 9), Beat(57, 396, "reading data", 9)
    before = {0: ahead, 1: ahead, 2: late}
    now = {rank: Beat(beat.iteration, beat.count, beat.activity, 12) for rank, beat in before.items()}
    assert "rank 2 hangs after iteration 57, reading data;" in who_hangs(before, now, 3, 480)
    waiting = {rank: Beat(57, 396, WAITING_FOR_DATA if rank else "reading data", 12) for rank in range(3)}
    assert "rank 0 hangs after iteration 57, reading data;" in who_hangs(before, waiting, 3, 480)
    silent = {**now, 0: ahead}
    assert "rank 0 does not respond" in who_hangs(before, silent, 3, 480)
    assert "rank 3 does not respond" in who_hangs(before, now, 4, 480)
    alike = {rank: Beat(57, 400, "saving", 12) for rank in range(3)}
    assert "all ranks hang after iteration 57, saving" in who_hangs(before, alike, 3, 480)


def test_a_stopped_launcher_wakes_to_a_running_run(work: Path) -> None:
    run = Run(settings(work, "asleep", TRAIN_ITERS=ENDLESS), work / "asleep.log")
    run.wait_for("iteration 3/")
    run.process.send_signal(signal.SIGSTOP)
    run.wait_for("iteration 20/")  # its ranks continue
    run.process.send_signal(signal.SIGCONT)
    run.process.send_signal(signal.SIGTERM)
    run.end(75)
