"""Split of linear_qkv's output into query, key and value, with rotary embedding, in one Triton kernel.

Letters: s sequence, b micro-batch, g query groups of this rank, r query heads per group, d head size.

The layout [s, b, g, (r + 2) * d] is Megatron-Core's (get_query_key_value_tensors in its transformer/attention.py): the
queries, the key and the value of each group. The pairs (i, i + d / 2) are rotated, as in Hugging Face's rotate_half.
"""

# ruff: noqa: ANN001, ANN202
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

TOKENS = 4  # per program


@triton.jit
def _angles(freqs, token, batch, column, half: tl.constexpr):  # type: ignore[no-untyped-def]
    angle = tl.load(freqs + (token // batch)[:, None] * 2 * half + column[None, :])
    return tl.cos(angle)[:, None, :], tl.sin(angle)[:, None, :]


@triton.jit
def _qkv_rope_forward(  # type: ignore[no-untyped-def]
    mixed,
    freqs,
    q,
    k,
    v,
    rows,
    batch,
    groups,
    r,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    half: tl.constexpr,
):
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    head = tl.arange(0, heads)[None, :, None]
    column = tl.arange(0, half)
    in_range = (token < rows)[:, None, None]
    cos, sin = _angles(freqs, tl.minimum(token, rows - 1), batch, column, half)
    offset = (token.to(tl.int64) * groups + tl.program_id(1))[:, None, None]  # of this group's heads, for each token
    column = column[None, None, :]
    source = mixed + (offset * (r + 2) + head) * 2 * half + column
    inside = in_range & (head < r + 2)
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    kind = q.dtype.element_ty
    rotated_first = (first * cos - second * sin).to(kind)
    rotated_second = (second * cos + first * sin).to(kind)
    query = q + (offset * r + head) * 2 * half + column
    tl.store(query, rotated_first, mask=in_range & (head < r))
    tl.store(query + half, rotated_second, mask=in_range & (head < r))
    key = k + offset * 2 * half + column + head * 0
    tl.store(key, rotated_first, mask=in_range & (head == r))
    tl.store(key + half, rotated_second, mask=in_range & (head == r))
    value = v + offset * 2 * half + column + head * 0
    tl.store(value, first.to(kind), mask=in_range & (head == r + 1))
    tl.store(value + half, second.to(kind), mask=in_range & (head == r + 1))


@triton.jit
def _qkv_rope_backward(  # type: ignore[no-untyped-def]
    d_q,
    d_k,
    d_v,
    freqs,
    d_mixed,
    rows,
    batch,
    groups,
    r,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    half: tl.constexpr,
):
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    head = tl.arange(0, heads)[None, :, None]
    column = tl.arange(0, half)
    in_range = (token < rows)[:, None, None]
    cos, sin = _angles(freqs, tl.minimum(token, rows - 1), batch, column, half)
    offset = (token.to(tl.int64) * groups + tl.program_id(1))[:, None, None]
    column = column[None, None, :]
    query = d_q + (offset * r + head) * 2 * half + column
    key = d_k + offset * 2 * half + column + head * 0
    value = d_v + offset * 2 * half + column + head * 0
    is_query, is_key, is_value = in_range & (head < r), in_range & (head == r), in_range & (head == r + 1)
    first = tl.load(query, mask=is_query, other=0.0).to(tl.float32)
    first += tl.load(key, mask=is_key, other=0.0).to(tl.float32)
    second = tl.load(query + half, mask=is_query, other=0.0).to(tl.float32)
    second += tl.load(key + half, mask=is_key, other=0.0).to(tl.float32)
    value_first = tl.load(value, mask=is_value, other=0.0).to(tl.float32)
    value_second = tl.load(value + half, mask=is_value, other=0.0).to(tl.float32)
    inside = in_range & (head < r + 2)
    target = d_mixed + (offset * (r + 2) + head) * 2 * half + column
    kind = d_mixed.dtype.element_ty
    # At a value `first` and `second` are 0, and at a query or key the value's halves are.
    tl.store(target, (first * cos + second * sin + value_first).to(kind), mask=inside)
    tl.store(target + half, (second * cos - first * sin + value_second).to(kind), mask=inside)


class QkvRope(torch.autograd.Function):
    """mixed [s, b, g, (r + 2) * d], angles float32 [s, 1, 1, d] -> queries [s, b, g * r, d], keys, values [s, b, g, d].

    In the dtype of `mixed`, computed in float32. The two halves of the angles' last axis are equal.
    """

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, freqs: torch.Tensor, r: int) -> tuple[torch.Tensor, ...]:
        """The three tensors, contiguous; `mixed` is not saved."""
        s, b, g, width = mixed.shape
        d = width // (r + 2)
        mixed, freqs = mixed.contiguous(), freqs.float().contiguous()
        q = mixed.new_empty(s, b, g * r, d)
        k, v = (mixed.new_empty(s, b, g, d) for _ in range(2))
        ctx.freqs, ctx.r = freqs, r  # Megatron-Core caches the angles: one tensor for all layers
        grid, sizes = _launch(s * b, g, r, d)
        _qkv_rope_forward[grid](mixed, freqs, q, k, v, s * b, b, g, r, **sizes)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of `mixed`."""
        d_q, d_k, d_v = (gradient.contiguous() for gradient in upstream)
        s, b, g, d = d_k.shape
        d_mixed = d_q.new_empty(s, b, g, (ctx.r + 2) * d)
        grid, sizes = _launch(s * b, g, ctx.r, d)
        _qkv_rope_backward[grid](d_q, d_k, d_v, ctx.freqs, d_mixed, s * b, b, g, ctx.r, **sizes)
        return d_mixed, None, None


def _launch(rows: int, g: int, r: int, d: int) -> tuple[tuple[int, int], dict[str, int]]:
    sizes = {"tokens": TOKENS, "heads": triton.next_power_of_2(r + 2), "half": d // 2}
    return (triton.cdiv(rows, TOKENS), g), sizes


def split_and_rotate(
    mixed: torch.Tensor, q_freqs: torch.Tensor, k_freqs: torch.Tensor, parts: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Query, key and value; Megatron-Core's attention calls it with fused_single_qkv_rope.

    `parts`: the sizes of a group's queries, key and value in the last axis of `mixed`.
    """
    assert q_freqs is k_freqs, "Qwen rotates query and key by the same angles"
    return QkvRope.apply(mixed, q_freqs, parts[0] // parts[1])
