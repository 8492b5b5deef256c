"""SwiGLU and its gradient, one Triton kernel each that reads and writes every value once (arXiv 2002.05202).

Letters: n tokens of a micro-batch, f this rank's part of ffn_hidden_size.

Megatron-Core's is compiled by torch.compile, whose backward kernel reads its inputs once for each half of its result.
"""

# ruff: noqa: ANN001, ANN202
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _swiglu_forward(gate_and_up, out, width, blocks, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    inside = columns < width
    start = gate_and_up + row * 2 * width
    gate = tl.load(start + columns, mask=inside).to(tl.float32)
    up = tl.load(start + width + columns, mask=inside).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(d_out, gate_and_up, d_both, width, blocks, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    inside = columns < width
    start = gate_and_up + row * 2 * width
    d_activated = tl.load(d_out + row * width + columns, mask=inside).to(tl.float32)
    gate = tl.load(start + columns, mask=inside).to(tl.float32)
    up = tl.load(start + width + columns, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d_activated * up * sigmoid * (1 + gate * (1 - sigmoid))
    result = d_both + row * 2 * width
    tl.store(result + columns, d_gate.to(d_both.dtype.element_ty), mask=inside)
    tl.store(result + width + columns, (d_activated * gate * sigmoid).to(d_both.dtype.element_ty), mask=inside)


class SwiGLU(torch.autograd.Function):
    """[n, 2f], the gate's values first -> silu(gate) * up [n, f] in the same dtype, computed in float32."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        """The product; the input is saved for the backward pass."""
        gate_and_up = gate_and_up.contiguous()
        ctx.save_for_backward(gate_and_up)
        rows, width = gate_and_up.shape[0], gate_and_up.shape[1] // 2
        out = gate_and_up.new_empty(rows, width)
        blocks = triton.cdiv(width, BLOCK)
        _swiglu_forward[(rows * blocks,)](gate_and_up, out, width, blocks, block=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
        """The gradient of the input, [n, 2f]."""
        (gate_and_up,) = ctx.saved_tensors
        rows, width = gate_and_up.shape[0], gate_and_up.shape[1] // 2
        gradient = torch.empty_like(gate_and_up)
        blocks = triton.cdiv(width, BLOCK)
        _swiglu_backward[(rows * blocks,)](upstream[0].contiguous(), gate_and_up, gradient, width, blocks, block=BLOCK)
        return gradient


def bias_swiglu(gate_and_up: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """[..., 2f] -> [..., f]: Megatron-Core's bias_swiglu_impl, without a bias and without inputs saved in FP8."""
    assert bias is None, "Qwen's MLP has no bias"
    out: torch.Tensor = SwiGLU.apply(gate_and_up.flatten(0, -2))
    return out.view(*gate_and_up.shape[:-1], -1)
