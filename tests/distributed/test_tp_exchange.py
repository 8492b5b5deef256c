"""Tensor parallel layers that communicate piece by piece: loss and every gradient are those of Megatron-Core's."""

from pathlib import Path
from typing import Any

import pytest

from common.training.tracking.records import read_metrics
from tests.distributed.launch import forked
from tests.distributed.test_context_parallel import BOUND, Gradients, difference, result, settings
from tests.distributed.user import step3_forked, step3_words

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"TP": 2, "GPUS": 2},
    "tp_pp": {"TP": 2, "PP": 2, "GPUS": 4, "RECOMPUTE": "full"},
    "tp_dp": {"TP": 2, "GPUS": 4},
}


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, tuple[float, Gradients]]:
    """The loss and gradients of Megatron-Core's communication, by layout."""
    for name, layout in LAYOUTS.items():
        step3_forked(settings(work, "plain", name, **layout))
    return {name: result(work, "plain", name) for name in LAYOUTS}


def changed(work: Path, layout: str, change: str) -> tuple[float, Gradients]:
    """The result of a run with a change of exchange_worker.py."""
    flags = step3_words(settings(work, "plain", f"{layout} {change}", **LAYOUTS[layout]))
    forked(LAYOUTS[layout]["GPUS"], "tests.distributed.exchange_worker", [change, *flags])
    return result(work, "plain", f"{layout} {change}")


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        pytest.param("tp", "linears", marks=pytest.mark.lane),
        pytest.param("tp", "products", marks=pytest.mark.lane),
        ("tp_pp", "products"),
        ("tp_dp", "products"),  # whose weights are gathered beside the forward pass
    ],
)
def test_loss_and_gradients_are_the_same(
    work: Path, alone: dict[str, tuple[float, Gradients]], layout: str, change: str
) -> None:
    (loss, gradients), (found, mine) = alone[layout], changed(work, layout, change)
    assert abs(found - loss) <= BOUND * loss
    assert difference(mine, gradients) <= BOUND


@pytest.mark.parametrize("mutant", ["without the sum", "in its own order"])
def test_each_mutant_is_far_outside_the_bound(
    work: Path, alone: dict[str, tuple[float, Gradients]], mutant: str
) -> None:
    _, mine = changed(work, "tp", mutant)
    assert difference(mine, alone["tp"][1]) > 1000 * BOUND


def test_adapters_train_the_same(work: Path) -> None:
    """The products' weights are frozen, and the adapters communicate by themselves."""
    lora = {"TUNER": "lora", "TRAIN_ITERS": 3, "LR": 1e-2, "RECOMPUTE": "full"}
    names = ["lora megatron", "lora linears"]
    step3_forked(settings(work, "plain", names[0], **lora, **LAYOUTS["tp"]))
    flags = step3_words(settings(work, "plain", names[1], **lora, **LAYOUTS["tp"]))
    forked(2, "tests.distributed.exchange_worker", ["linears", *flags])
    one, other = ([row["loss"] for row in read_metrics(work / f"plain_{name}")] for name in names)
    assert len(one) == 3 and other == pytest.approx(one, rel=2e-6) and abs(one[2] - one[0]) > 1e-3
