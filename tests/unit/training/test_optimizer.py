"""Adam stepping through its groups in parts is Adam stepping through them whole; the schedule ends at MIN_LR."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.training.settings import TrainSettings
from common.training.state.optimizer import _parts, step_in_parts
from common.training.state.scheduler import build_scheduler, override_checkpoint_settings


class CountingAdam(torch.optim.Optimizer):
    """Keeps the number of steps in the group, as Transformer Engine's does, and remembers what each step was given."""

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, {"lr": 0.1})
        self.sizes: list[int] = []

    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self.sizes.append(sum(p.numel() for p in group["params"]))
            for p in group["params"]:
                state = self.state[p]
                state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * p.grad
                p.data -= group["lr"] / group["step"] * state["m"]


def test_steps_and_values_are_those_of_whole_groups_and_parts_are_bounded() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size) for size in (3, 4, 9, 2, 2, 5)]
    optimizers = []
    for _ in range(2):
        params = [torch.nn.Parameter(t.clone()) for t in tensors]
        optimizers.append(CountingAdam([{"params": params[:4]}, {"params": params[4:], "lr": 0.5}, {"params": []}]))
    whole, parts = optimizers
    step_in_parts(parts, 7)
    for number in range(3):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
                for p in group["params"]:
                    p.grad = torch.full_like(p, number + 1.0)
            optimizer.step()
    assert parts.sizes[:4] == [7, 9, 2, 7]
    assert max(parts.sizes) == 9 and len(parts.sizes) == 3 * 4
    assert [g["step"] for g in parts.param_groups[:2]] == [3, 3]
    for a, b in zip(whole.param_groups, parts.param_groups, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a["params"], b["params"], strict=True))


def test_no_parameter_is_left_out_of_the_parts() -> None:
    params = [torch.zeros(size) for size in (1, 8, 8, 1, 1)]
    assert [[p.numel() for p in part] for part in _parts(copy.copy(params), 8)] == [[1], [8], [8], [1, 1]]
    assert _parts([], 8) == []


def settings(**changes: Any) -> TrainSettings:
    given = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 10, "lr": 1e-3, "min_lr": 1e-4, **changes}
    return TrainSettings(**given)


def rates(chosen: TrainSettings) -> list[float]:
    """The learning rate of each of ten steps."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    scheduler = build_scheduler(optimizer, chosen, 10 * chosen.global_batch_size)
    taken = []
    for _ in range(10):
        taken.append(optimizer.param_groups[0]["lr"])
        scheduler.step(chosen.global_batch_size)
    return taken


@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_the_first_step_has_lr_and_the_last_one_min_lr(style: str, batch: int) -> None:
    found = rates(settings(lr_decay_style=style, global_batch_size=batch))
    assert found[0] == pytest.approx(1e-3) and found[-1] == pytest.approx(1e-4)
    assert found == sorted(found, reverse=True) and found[-2] > 1.01e-4
    if style == "linear":
        assert found == pytest.approx([1e-3 - number * 1e-4 for number in range(10)])


def test_a_warm_up_begins_at_0_and_reaches_lr_after_its_steps() -> None:
    found = rates(settings(lr_warmup_iters=4))
    assert found[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert found[5] < 1e-3 and found[-1] == pytest.approx(1e-4)


def test_a_run_of_one_step_has_a_schedule() -> None:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    build_scheduler(optimizer, settings(), 16)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_the_commands_settings_take_the_place_of_a_checkpoints_and_what_changed_is_said() -> None:
    saved = {"max_lr": 5e-3, "min_lr": 1e-4, "eps": 1e-8, "betas": [0.9, 0.95], "lr": 5e-3, "weight_decay": 0.0}
    optimizer = SimpleNamespace(param_groups=[dict(saved), dict(saved)])
    chosen = settings()
    scheduler = build_scheduler(optimizer, chosen, 160)
    assert override_checkpoint_settings(optimizer, scheduler, chosen) == [
        "LR 0.005 -> 0.001", "ADAM_BETA1, ADAM_BETA2 (0.9, 0.95) -> (0.9, 0.999)",
    ]  # fmt: skip
    for group in optimizer.param_groups:
        assert (group["max_lr"], group["betas"]) == (1e-3, (0.9, 0.999)) and group["lr"] == pytest.approx(1e-3)
    assert override_checkpoint_settings(optimizer, scheduler, chosen) == []
