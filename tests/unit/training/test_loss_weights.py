"""Gradients are divided by the sum of all weights, whatever they are and however many."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.training.launching.hang_detector import Heartbeat
from common.training.loop.forward_step import forward_step
from common.training.state import loss_weights
from common.training.state.loss_weights import LossWeights
from common.training.state.step_times import StepTimes

CPU = torch.device("cpu")
GROUPS = {"pipeline": 1.0, "data": 2.0}  # what each adds up to, in parts of this rank's: the other stages have nothing


class Chunk:
    """The gradients of Megatron-Core's DistributedDataParallel."""

    def __init__(self) -> None:
        self.gradients = torch.full((3,), 6e6)

    def scale_gradients(self, scaling: torch.Tensor) -> None:
        self.gradients *= scaling


@pytest.fixture(autouse=True)
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The groups over which sums were made; two replicas of one stage each, with the same weights."""
    done: list[str] = []

    def all_reduce(total: torch.Tensor, group: str) -> None:
        done.append(group)
        total *= GROUPS[group]

    groups = SimpleNamespace(
        get_pipeline_model_parallel_group=lambda: "pipeline",
        get_data_parallel_group=lambda with_context_parallel: "data" if with_context_parallel else "without CP",
    )
    monkeypatch.setattr(loss_weights, "parallel_state", groups)
    monkeypatch.setattr(loss_weights, "dist", SimpleNamespace(all_reduce=all_reduce))
    monkeypatch.setattr(loss_weights, "finalize_model_grads", lambda model, num_tokens, **more: done.append("core"))
    return done


def finalized(weights: LossWeights) -> list[Chunk]:
    chunks = [Chunk(), Chunk()]
    weights.finalize(chunks, torch.tensor(7, dtype=torch.int32))  # Megatron-Core's count, which is not used
    return chunks


def test_fractions_over_ten_million_tokens_lose_nothing(reduced: list[str]) -> None:
    weights = LossWeights(CPU)
    part = torch.full((1, 625), 0.3)  # 187.5, which a count of whole tokens rounds
    for _ in range(10**7 // 625):
        weights.add(part.sum())
    total = 2 * 10**7 * part[0, 0].double().item()  # over both replicas
    assert reduced == [] and weights.total.item() == pytest.approx(total / 2, rel=1e-6)
    for chunk in finalized(weights):
        assert chunk.gradients.tolist() == pytest.approx([6e6 / total] * 3, rel=1e-6)
    assert reduced == ["core", "pipeline", "data"]
    assert weights.total.item() == 0  # the next step begins anew


def test_one_small_weight_counts_beside_many_large_ones() -> None:
    weights = LossWeights(CPU)
    weights.add(torch.tensor(2.0**30))
    weights.add(torch.tensor(0.25))  # float32 has steps of 128 there
    assert weights.total.item() == 2**30 + 0.25


@pytest.mark.parametrize("total", [2**31 / 256, 2**31 + 512, 2**40])  # the first one counted in 256ths
def test_a_sum_that_int32_does_not_hold_keeps_its_sign(total: float) -> None:
    weights = LossWeights(CPU)
    for _ in range(4):
        weights.add(torch.tensor(total / 4))
    (chunk, _) = finalized(weights)
    assert chunk.gradients.tolist() == pytest.approx([6e6 / (2 * total)] * 3, rel=1e-6)


def test_without_a_weight_the_gradients_stay_the_zeros_that_they_are() -> None:
    assert [chunk.gradients.tolist() for chunk in finalized(LossWeights(CPU))] == [[6e6] * 3] * 2


def test_a_micro_batch_counts_its_weights_when_it_is_trained_on_and_not_when_it_is_measured() -> None:
    plan: Any = SimpleNamespace(
        platform=SimpleNamespace(device="cpu"), sizes=SimpleNamespace(cp=1), packed_sequences=False,
        settings=SimpleNamespace(train_mode="finetune", rows_per_sample=1),
    )  # fmt: skip
    training_state: Any = SimpleNamespace(heartbeat=Heartbeat(), times=StepTimes(), loss_weights=LossWeights(CPU))
    rows = {"tokens": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long),
            "loss_mask": torch.tensor([[0.5, 0.25, 0], [0, 1, 0.125]]),
            "num_padding": torch.tensor([1, 2])}  # fmt: skip

    def model(*_: Any, loss_mask: torch.Tensor, **more: Any) -> torch.Tensor:
        return 2 * loss_mask

    for counted in (0.0, 1.875):
        with torch.set_grad_enabled(counted > 0):
            output, loss_of = forward_step(plan, training_state)(iter([dict(rows)]), model)
            total, _, report = loss_of(output)
        assert (total.item(), report.tolist()) == (3.75, [3.75, 1.875, 3.0])
        assert training_state.loss_weights.total.item() == counted
