"""PROFILE writes traces that Chrome's viewer reads, of the steps and ranks that it names, and never ends a run.

They count a step's collectives.
"""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import steps
from tests.distributed.user import step3_forked


def train(work: Path, name: str, **more: Any) -> str:
    paths = {"DATASET_PATH": work / "pretrain", "LOAD_CHECKPOINT_PATH": work / "start"}
    return step3_forked({**paths, "SAVE_CHECKPOINT_PATH": work / name, "EVAL_INTERVAL": 0, **more})


def steps_in(path: Path) -> list[int]:
    """The profiler's numbers of the steps of a trace that have forward passes, which a run's last save has not."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events
             if event.get("name", "").startswith("ProfilerStep#") and event["cat"] == "user_annotation"}  # fmt: skip
    starts = [event["ts"] for event in events if event.get("name") == "aten::embedding"]
    return [
        int(name.removeprefix("ProfilerStep#"))
        for name, (begin, end) in spans.items()
        if any(begin <= start < end for start in starts)
    ]


def test_each_rank_traces_its_steps_and_a_run_that_ends_among_them_those_it_made(work: Path) -> None:
    same = {"GPUS": 2, "TRAIN_ITERS": 7, "PROFILE": "4-6", "PROFILE_RANKS": "all"}
    log = train(work, "traced", **same, EXIT_INTERVAL=5)
    folder = work / "traced" / "profile"
    assert f"profile: steps 4 to 6 of all ranks, to {folder}" in log
    assert re.search(rf"trace: {folder}/steps_4-5_rank_0.json.gz, [\d.]+ MB; https://ui.perfetto.dev", log)
    log = train(work, "traced", **same)
    names = [f"steps_{which}_rank_{rank}.json.gz" for which in ("4-5", "6-6") for rank in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    first, second, third, last = (steps_in(folder / name) for name in names)
    assert first == second == [1, 2]  # after a step of warm-up
    assert third == last == [0]  # the first step of the run that resumed
    assert [number for number, _, _ in steps(log)] == [6, 7]


def test_a_trace_that_cannot_be_written_is_one_warning(work: Path) -> None:
    (work / "untraced").mkdir()
    (work / "untraced" / "profile").write_text("a file where the folder would be")
    log = train(work, "untraced", GPUS=1, TRAIN_ITERS=3, PROFILE="1-2")
    assert log.count("steps_1-2_rank_0.json.gz cannot be written, training goes on: ") == 1
    assert [number for number, _, _ in steps(log)] == [1, 2, 3] and "saved" in log


def collectives(path: Path) -> dict[str, int]:
    """How often each of torch.distributed's collectives is called in a trace of one step."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    return dict(Counter(name.removeprefix("c10d::") for name in names if name.startswith("c10d::")))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, {"allreduce_": 2, "broadcast_": 1}),  # the number of tokens, which the last stage knows; the gradient norm
        ({"PP": 2}, {"allreduce_": 3, "broadcast_": 1, "send": 4, "recv_": 4}),  # and the tied embedding's gradient
    ],
    ids=["dp4", "pp2"],
)
def test_a_stop_and_a_bad_loss_are_agreed_on_with_the_gradient_norm(
    work: Path, sizes: dict[str, int], expected: dict[str, int]
) -> None:
    name = "counted_" + "_".join(sizes)
    more = {"GPUS": 4, "TRAIN_ITERS": 4, "LOG_INTERVAL": 100, "PROFILE": "3", "GLOBAL_BATCH_SIZE": 16}
    train(work, name, **more, **sizes)
    found = collectives(work / name / "profile" / "steps_3-3_rank_0.json.gz")
    buckets = 1 + bool(sizes)  # of weights and gradients on rank 0
    coalesced = {"allgather_into_tensor_coalesced_": buckets, "reduce_scatter_tensor_coalesced_": buckets}
    assert found == expected | coalesced
