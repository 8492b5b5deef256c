"""RMSNorm, alone or fused with the residual add before it, forward and backward: one Triton kernel each.

Letters: n tokens of a micro-batch (of this rank, under sequence parallelism), h hidden size. Formula: arXiv 1910.07467.

The sum is read once for both, and the residual's gradient is added where the norm's gradient is written. Unfused, that
takes three more passes over [n, h] per norm.
"""

# ruff: noqa: ANN001, ANN202
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

# Programs per multiprocessor in the backward pass, each with a partial sum of the weight's gradient; and rows per
# program, so that the reduction of the partial sums stays cheap.
FEWEST, MOST, ROWS = 2, 8, 32


@triton.jit
def _norm_forward(  # type: ignore[no-untyped-def]
    x, residual, weight, total, out, scale, width, eps, is_sum: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if is_sum:
        value += tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(scale + row, inverse)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (value * inverse * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    d_total,
    d_out,
    total,
    weight,
    scale,
    d_x,
    d_weight,
    rows,
    width,
    programs,
    is_sum: tl.constexpr,
    block: tl.constexpr,
):
    column = tl.arange(0, block)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    gathered = tl.zeros([block], tl.float32)
    row = tl.program_id(0).to(tl.int64)
    for _ in range(tl.cdiv(rows - tl.program_id(0), programs)):
        above = tl.load(d_out + row * width + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + row * width + column, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(scale + row)
        normed = value * inverse
        gathered += above * normed
        above *= factor
        result = (above - normed * (tl.sum(above * normed, 0) / width)) * inverse
        if is_sum:
            result += tl.load(d_total + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + row * width + column, result.to(d_x.dtype.element_ty), mask=inside)
        row += programs
    tl.store(d_weight + tl.program_id(0) * width + column, gathered, mask=inside)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The normalized x; saves x and one float32 per row."""
        x = x.contiguous()
        _, out, scale = _run_forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and of the weight."""
        return *_run_backward(None, upstream[0], *ctx.saved_tensors), None


class _NormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum and its norm; saves the sum and one float32 per row."""
        total, out, scale = _run_forward(x.contiguous(), residual.contiguous(), weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.set_materialize_grads(False)  # the last sum of a model has no other consumer than its norm
        return total, out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x and of residual, one tensor for both, and of the weight."""
        d_total, d_out = upstream
        if d_out is None:
            return d_total, d_total, None, None
        d_x, d_weight = _run_backward(d_total, d_out, *ctx.saved_tensors)
        return d_x, d_x, d_weight, None


def _run_forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    is_sum = residual is not None
    _norm_forward[(rows,)](x, residual if is_sum else x, weight, total, out, scale, width, eps, is_sum, **_sizes(width))
    return total, out, scale


def _run_backward(
    d_total: torch.Tensor | None, d_out: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    width, rows = total.shape[-1], scale.numel()
    processors = _multiprocessors(total.device)
    programs = min(rows, max(FEWEST * processors, min(MOST * processors, rows // ROWS)))
    d_out, d_x = d_out.contiguous(), torch.empty_like(total)
    d_weight = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    is_sum = d_total is not None
    d_residual = d_total.contiguous() if d_total is not None else d_out
    _norm_backward[(programs,)](
        d_residual, d_out, total, weight, scale, d_x, d_weight, rows, width, programs, is_sum, **_sizes(width)
    )
    return d_x, d_weight.sum(0).to(weight.dtype)


def _sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"block": block, "num_warps": min(max(block // 256, 4), 16)}


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class TritonNorms:
    """The Norms of `common.model.layers.residual_norm` with these kernels."""

    @staticmethod
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., h] -> x / sqrt(mean(x^2) + eps) * weight in its dtype, computed in float32."""
        out: torch.Tensor = _Norm.apply(x, weight, eps)
        return out

    @staticmethod
    def norm_of_sum(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [..., h] -> their sum, rounded to their dtype, and the norm of the rounded sum."""
        total, out = _NormOfSum.apply(x, residual, weight, eps)
        return total, out
