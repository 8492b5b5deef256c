"""The share of padding that a fine-tuning run records, and the advice to pack."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.data.dataset.builder import build_dataset
from common.data.dataset.manifest import resolve
from common.report.runs import read_run
from tests.distributed.user import step3_forked

ADVICE = "PACKING=true puts several samples"
BATCH, LENGTH, STEPS = 8, 128, 6


def train(work: Path, name: str, **more: Any) -> str:
    flags = {
        "TRAIN_MODE": "finetune", "DATASET_PATH": work / "sft", "LOAD_CHECKPOINT_PATH": work / "start",
        "SAVE_CHECKPOINT_PATH": work / name, "SEQ_LENGTH": LENGTH, "SPLIT": "100,0,0", "TRAIN_ITERS": STEPS,
        "LOG_INTERVAL": 3, **more,
    }  # fmt: skip
    return step3_forked(flags)


def expected(work: Path, packing: bool, steps: range) -> float:
    """The share of positions that hold the padding's id 0, which no token of these rows has, in what the steps read."""
    options = {"train_mode": "finetune", "seq_length": LENGTH, "seed": 1234, "packing": packing}
    samples = build_dataset(resolve(str(work / "sft")), **options)
    rows = [samples[i]["tokens"] for step in steps for i in range(step * BATCH, (step + 1) * BATCH)]
    return sum(int((row == 0).sum()) for row in rows) / (len(rows) * LENGTH)


@pytest.mark.parametrize(
    ("name", "packing", "layout"),
    [
        ("dp2", False, {"PACKING": "false", "GPUS": 2}),
        ("tp2_pp2", False, {"PACKING": "false", "TP": 2, "PP": 2, "GPUS": 4}),
        ("packed", True, {"GPUS": 2}),  # by default
    ],
)
def test_the_share_is_that_of_the_samples_of_the_interval(
    work: Path, name: str, packing: bool, layout: dict[str, Any]
) -> None:
    log = train(work, name, **layout)
    curve = read_run(work / name).curve("padding")
    shares = [expected(work, packing, steps) for steps in (range(1), range(1, 3), range(3, 6))]
    assert curve == [(i, pytest.approx(share, abs=1e-9)) for i, share in zip((1, 3, 6), shares, strict=True)]
    assert (shares[0] > 0.5) != packing
    assert re.findall(r"iteration \d+/.* ([\d.]+)% ", log) == [f"{100 * share:.1f}" for share in shares]
    assert log.count(ADVICE) == (not packing)
    found = re.findall(r"packing: a sample is a row of ([\d.]+) conversations on average, (\d+)% full; a step", log)
    assert len(found) == packing
    if packing:
        options = {"train_mode": "finetune", "seq_length": LENGTH, "seed": 1234}
        rows, singles = (build_dataset(resolve(str(work / "sft")), packing=each, **options) for each in (True, False))
        assert found[0][0] == f"{singles.samples_per_epoch / rows.samples_per_epoch:.1f}"
    assert (work / name / "log.txt").read_text(encoding="utf-8").count(ADVICE) == (not packing)
    events = EventAccumulator(str(work / name / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("padding")] == [1, 3, 6]


def test_pretraining_has_no_padding_to_speak_of(work: Path) -> None:
    log = train(work, "pretrain_rows", TRAIN_MODE="pretrain", DATASET_PATH=work / "pretrain")
    assert not re.search(r"padding|\bpad\b", log) and not read_run(work / "pretrain_rows").curve("padding")
