"""Where the gradients of weights go: added to Megatron-Core's float32 `main_grad` where there is one."""

from collections.abc import Callable

import torch

from common.model.layers.attention import TORCH


def give_gradient(weight: torch.Tensor, add: Callable[[torch.Tensor], object]) -> torch.Tensor:
    """What autograd gets for `weight`, whose gradient `add` adds to the float32 tensor of its shape that it is given.

    Where the weight has a `main_grad`, the gradient is added there, and what autograd gets is empty.
    """
    if not hasattr(weight, "main_grad"):
        total = torch.zeros_like(weight, dtype=torch.float32)
        add(total)
        return total.to(weight.dtype)
    add(weight.main_grad)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # As Megatron-Core's own layers: zeros where another gradient of this weight is still to be added to it.
    empty = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return empty(weight)


def put_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, add: bool) -> None:
    """Puts left^T [v, c] x right [c, h] into the float32 `total` [v, h], or adds it to what is there."""
    if left.dtype == total.dtype:
        torch.addmm(total, left.t(), right, beta=int(add), out=total)
    elif left.is_cuda and TORCH >= (2, 9):
        torch.addmm(total, left.t(), right, beta=int(add), out_dtype=torch.float32, out=total)
    elif add:
        total += left.t() @ right
    else:
        total.copy_(left.t() @ right)
