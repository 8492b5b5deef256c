"""Adam that steps through its groups in parts gives the same weights as Adam that steps through full groups."""

import torch

from common.training.state.optimizer import parts_of, step_in_parts


class CountingAdam(torch.optim.Optimizer):
    """Holds the number of steps in the group, as Transformer Engine's does, and records what each step was given."""

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
    full, parts = optimizers
    step_in_parts(parts, lambda params: parts_of(params, 7))
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
    for a, b in zip(full.param_groups, parts.param_groups, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a["params"], b["params"], strict=True))


def test_no_parameter_is_left_out_of_the_parts() -> None:
    params = [torch.zeros(size) for size in (1, 8, 8, 1, 1)]
    assert [[p.numel() for p in part] for part in parts_of(params, 8)] == [[1], [8], [8], [1, 1]]
    assert parts_of([], 8) == []
