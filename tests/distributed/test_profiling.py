"""PROFILE writes traces that Chrome's viewer reads, of the steps and ranks that it names, and never ends a run."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

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
