"""Accumulation of weight gradients into Megatron-Core's float32 `main_grad`."""

from collections.abc import Callable

import torch

from common.model.layers.attention import TORCH


def accumulate_main_grad(weight: torch.Tensor, add: Callable[[torch.Tensor], object]) -> torch.Tensor:
    """The gradient to return to autograd for `weight`; `add` adds it to a float32 tensor of the weight's shape.

    If the weight has a `main_grad`, the gradient is added there, and autograd gets an unused tensor.
    """
    if not hasattr(weight, "main_grad"):
        total = torch.zeros_like(weight, dtype=torch.float32)
        add(total)
        return total.to(weight.dtype)
    add(weight.main_grad)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # As in Megatron-Core's layers: zeros if autograd adds another gradient of this weight, as with tied embeddings.
    empty = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return empty(weight)


def matmul_into(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, add: bool) -> None:
    """Writes left^T [v, c] x right [c, h] to the float32 `total` [v, h], or adds it with `add`."""
    if left.dtype == total.dtype:
        torch.addmm(total, left.t(), right, beta=int(add), out=total)
    elif left.is_cuda and TORCH >= (2, 9):
        torch.addmm(total, left.t(), right, beta=int(add), out_dtype=torch.float32, out=total)
    elif add:
        total += left.t() @ right
    else:
        total.copy_(left.t() @ right)
