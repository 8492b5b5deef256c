"""One rank of a tensor-parallel group reads for all, and a pipeline stage gets only what it uses of a micro-batch."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from common.training.launching.hang_detector import WAITING_FOR_DATA
from tests.distributed.launch import steps, train_forked
from tests.distributed.test_training import assert_same_curve, settings
from tests.distributed.user import ENDLESS, Run

KINDS: dict[str, dict[str, Any]] = {
    "packed": {"mode": "finetune", "packing": True},
    "separated": {"mode": "pretrain", "reset_attention": True},
}
# The chunks in the middle need the bounds of the segments alone: with VPP beside the first and the last on a rank.
LAYOUTS = [("packed", {"tp": 2, "pp": 2, "vpp": 2, "gpus": 4}), ("separated", {"pp": 4, "gpus": 4})]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS, ids=["packed", "separated"])
def test_segments_reach_every_stage(work: Path, kind: str, layout: dict[str, int]) -> None:
    def trained(name: str, **sizes: int) -> list[tuple[int, float, float]]:
        flags = {**settings(work, **KINDS[kind]), "seq_length": 96, "train_iters": 6, **sizes}
        return steps(train_forked(**flags, save_checkpoint_path=work / f"{kind}_{name}"))

    one = trained("one")
    many = trained("many", **layout)
    assert len(one) == 6
    assert_same_curve(many, one)
    assert abs(many[0][1] - one[0][1]) <= 1e-5  # without the bounds somewhere it is 1e-4


def test_a_group_has_one_reader_whose_dead_worker_ends_the_run(work: Path) -> None:
    paths = {"DATASET_PATH": work / "pretrain", "LOAD_CHECKPOINT_PATH": work / "start"}
    sizes = {"GPUS": 4, "TP": 2, "PP": 2, "EVAL_INTERVAL": 0, "TRAIN_ITERS": ENDLESS}
    run = Run({**paths, **sizes, "SAVE_CHECKPOINT_PATH": work / "readers"}, work / "readers.log")
    run.wait_for("iteration 3/")
    workers = [rank.children() for rank in run.ranks()]
    assert [len(each) for each in workers] == [2, 0, 2, 0]  # NUM_WORKERS on the first rank of each stage's group
    os.kill(workers[0][0].pid, signal.SIGKILL)
    log = run.end(1, 60)
    assert "rank 0 failed first, with exit code 1" in log
    assert (
        f"DataLoader worker (pid {workers[0][0].pid}) is killed by signal: Killed"
        in log.split("traceback of rank 0")[1]
    )


def test_a_rank_that_waits_for_another_ones_reading_is_not_the_one_that_hangs(work: Path) -> None:
    paths = {"DATASET_PATH": work / "pretrain", "LOAD_CHECKPOINT_PATH": work / "start"}
    sizes = {"GPUS": 2, "TP": 2, "EVAL_INTERVAL": 0, "TRAIN_ITERS": ENDLESS, "HANG_TIMEOUT_MIN": 0.1}
    run = Run({**paths, **sizes, "SAVE_CHECKPOINT_PATH": work / "stalled"}, work / "stalled.log")
    run.wait_for("iteration 3/")
    for each in run.ranks()[0].children():
        each.suspend()
    log = run.end(1, 60)
    assert re.search(r"error: HANG_TIMEOUT_MIN=0.1: rank 0 hangs after iteration \d+, reading data;", log)
    assert re.search(rf"rank 1: no progress for \d+ s after iteration \d+, {WAITING_FOR_DATA}; its stack:", log)
