"""Context parallelism by the script's defaults: loss and every gradient are those of CP=1, packed, separated or not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.training.tracking.records import read_metrics
from tests.conversion import to_megatron
from tests.distributed.launch import forked, steps
from tests.distributed.user import step3_forked, step3_words

BOUND = 2e-6  # of each gradient's largest value, in float32: the terms are summed in another order
Gradients = dict[str, torch.Tensor]
MOMENT = "optimizer.state.exp_avg."
DATA: dict[str, dict[str, Any]] = {
    "packed": {"TRAIN_MODE": "finetune", "SEQ_LENGTH": 96},
    "separated": {"RESET_ATTENTION": "true", "SEQ_LENGTH": 96},
    "plain": {"SEQ_LENGTH": 96, "MICRO_BATCH_SIZE": 2},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp": {"CP": 2, "GPUS": 2},
    "cp_tp": {"CP": 2, "TP": 2, "GPUS": 4},
    "cp_pp": {"CP": 2, "PP": 2, "GPUS": 4, "RECOMPUTE": "full"},
}


def settings(work: Path, data: str, name: str, **more: Any) -> dict[str, Any]:
    return {
        "DATASET_PATH": work / ("sft" if data == "packed" else "pretrain"), "LOAD_CHECKPOINT_PATH": work / "start",
        "SAVE_CHECKPOINT_PATH": work / f"{data}_{name}", "EVAL_INTERVAL": 0, "PRECISION": "fp32", "TRAIN_ITERS": 1,
        "CLIP_GRAD": 0, **DATA[data], **more,
    }  # fmt: skip


def result(work: Path, data: str, name: str) -> tuple[float, Gradients]:
    """The loss of a run's first step, and each gradient: Adam's first moment is then (1 - beta1) times it."""
    folder = work / f"{data}_{name}"
    reader = TorchDistReader(folder / "iter_0000001")
    moments = {key.removeprefix(MOMENT): reader.read(key) for key in reader.tensors if key.startswith(MOMENT)}
    (loss, *_) = (row["loss"] for row in read_metrics(folder) if "loss" in row)
    return loss, moments


def difference(mine: Gradients, theirs: Gradients) -> float:
    """The largest difference of a gradient, relative to that gradient's largest value."""
    assert mine.keys() == theirs.keys() and len(theirs) == 9  # each of all layers
    return max(float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, tuple[float, Gradients]]:
    """CP=1's loss and gradients, by the data."""
    for data in DATA:
        step3_forked(settings(work, data, "alone"))
    return {data: result(work, data, "alone") for data in DATA}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.lane] * (name == "cp")) for name in LAYOUTS])
def test_loss_and_gradients_are_those_of_one_rank(
    work: Path, alone: dict[str, tuple[float, Gradients]], layout: str, data: str
) -> None:
    step3_forked(settings(work, data, layout, **LAYOUTS[layout]))
    (loss, gradients), (found, mine) = alone[data], result(work, data, layout)
    assert abs(found - loss) <= BOUND * loss
    assert difference(mine, gradients) <= BOUND


def changed(work: Path, data: str, change: str) -> tuple[float, Gradients]:
    """The result of a run at CP=2 with a change of cp_worker.py."""
    flags = step3_words(settings(work, data, change, **LAYOUTS["cp"]))
    forked(2, "tests.distributed.cp_worker", [change, *flags])
    return result(work, data, change)


@pytest.mark.parametrize("data", ["packed", "plain"])
def test_long_chunks_are_attended_to_in_blocks_and_give_the_same(
    work: Path, alone: dict[str, tuple[float, Gradients]], data: str
) -> None:
    (loss, gradients), (found, mine) = alone[data], changed(work, data, "blocks")
    assert abs(found - loss) <= BOUND * loss
    assert difference(mine, gradients) <= BOUND


MUTANTS = {
    "own gradients alone": "plain", "keys in rank order": "plain", "as the first rank": "plain",
    "one document": "separated",
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_is_far_outside_the_bound(
    work: Path, alone: dict[str, tuple[float, Gradients]], mutant: str
) -> None:
    data = MUTANTS[mutant]
    _, mine = changed(work, data, mutant)
    assert difference(mine, alone[data][1]) > 1000 * BOUND


def test_a_run_saved_at_cp_2_goes_on_at_cp_1_with_the_same_losses(work: Path) -> None:
    """On its validation samples too; rows of several samples are the same rows at any CP."""
    more = {"TRAIN_ITERS": 4, "EVAL_INTERVAL": 2, "EVAL_ITERS": 1, "SPLIT": "80,20,0"}
    step3_forked(settings(work, "packed", "whole", **more))
    first = step3_forked(settings(work, "packed", "moved", **more, **LAYOUTS["cp_tp"], EXIT_INTERVAL=2))
    rest = step3_forked(settings(work, "packed", "moved", **more))
    assert [step[0] for step in steps(first)] == [1, 2] and [step[0] for step in steps(rest)] == [3, 4]
    expected, found = (read_metrics(work / f"packed_{name}") for name in ("whole", "moved"))
    for name, number in (("loss", 4), ("validation_loss", 2)):
        one, other = ([row[name] for row in rows if name in row] for rows in (expected, found))
        assert len(one) == number and other == pytest.approx(one, rel=1e-5)


def test_adapters_train_as_with_one_rank(work: Path) -> None:
    lora = {"TUNER": "lora", "TRAIN_ITERS": 3, "LR": 1e-2}
    for name, layout in (("lora", {}), ("lora_cp", LAYOUTS["cp_tp"])):
        step3_forked(settings(work, "packed", name, **lora, **layout))
    one, other = ([row["loss"] for row in read_metrics(work / f"packed_{name}")] for name in ("lora", "lora_cp"))
    assert len(one) == 3 and other == pytest.approx(one, rel=2e-6) and abs(one[2] - one[0]) > 1e-3


def test_torch_format_goes_on_with_as_many_replicas(work: Path) -> None:
    """Its optimizer is divided over DP x CP ranks, so two replicas may share rows or not."""
    start = to_megatron(work / "qwen", work / "start_torch", transformer_impl="local")
    more = {"TRAIN_ITERS": 4, "CKPT_FORMAT": "torch", "LOAD_CHECKPOINT_PATH": start}
    step3_forked(settings(work, "plain", "whole", **more))
    moved = settings(work, "plain", "moved", **more)
    step3_forked({**moved, **LAYOUTS["cp"], "EXIT_INTERVAL": 2})
    assert "of 2 data-parallel replicas, this run has 1 (DP x CP)" in step3_forked(moved, code=2)
    step3_forked({**moved, "GPUS": 2})
    one, other = ([row["loss"] for row in read_metrics(work / f"plain_{name}")] for name in ("whole", "moved"))
    assert len(one) == 4 and other == pytest.approx(one, rel=1e-5)
