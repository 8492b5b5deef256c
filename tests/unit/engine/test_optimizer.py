"""The handling of a distributed optimizer, in every version."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.engine.optimizer import make_optimizer_state


class _DecoupledAdam(torch.optim.Adam):
    """As Transformer Engine's FusedAdam with use_decoupled_grad: it reads, and clears, another attribute than grad."""

    use_decoupled_grad = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for each in group["params"]:
                self.state[each] = {"exp_avg": torch.zeros_like(each)}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                each.decoupled_grad = None


class _WatchedAdam(torch.optim.Adam):
    """Records how much memory the gradients of its step took."""

    gradients: set[int]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = {each.grad.untyped_storage().data_ptr() for g in self.param_groups for each in g["params"]}
        self.gradient_bytes = max(g["params"][0].grad.untyped_storage().nbytes() for g in self.param_groups)
        super().step()


@pytest.mark.parametrize("adam", [_DecoupledAdam, _WatchedAdam])
def test_making_the_optimizers_state_leaves_no_gradient(adam: type[torch.optim.Adam]) -> None:
    """Leftovers there made a run of 7B that fits run out of memory when it was resumed."""
    weights = [torch.nn.Parameter(torch.ones(size)) for size in ((3,), (4, 5), (2, 2))]
    optimizer = adam(weights, lr=0.0)
    make_optimizer_state(SimpleNamespace(optimizer=optimizer))
    assert [each.grad for each in weights] == [None] * 3
    assert all(torch.equal(optimizer.state[each]["exp_avg"], torch.zeros_like(each)) for each in weights)
    assert all(torch.equal(each, torch.ones_like(each)) for each in weights)
    if isinstance(optimizer, _WatchedAdam):
        assert len(optimizer.gradients) == 1, "the zeros of the largest parameter do for all"
        assert optimizer.gradient_bytes == 4 * 20
