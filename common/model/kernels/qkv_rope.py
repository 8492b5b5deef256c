"""Queries, keys and values out of the one tensor that the QKV layer gives, with rotary embedding, in one Triton kernel.

Letters: s sequence, b micro-batch, g key/value groups of this rank, r query heads a group, d head size.

The layout [s, b, g, (r + 2) * d] is Megatron-Core's (get_query_key_value_tensors in its transformer/attention.py): of
each group the queries, the key, the value. Rotated are the pairs (i, i + d / 2), as in Hugging Face's rotate_half.
"""

# ruff: noqa: ANN001, ANN202
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

TOKENS = 4  # of a program


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
    there = (token < rows)[:, None, None]
    cos, sin = _angles(freqs, tl.minimum(token, rows - 1), batch, column, half)
    place = (token.to(tl.int64) * groups + tl.program_id(1))[:, None, None]  # of this group's heads, of each token
    column = column[None, None, :]
    source = mixed + (place * (r + 2) + head) * 2 * half + column
    inside = there & (head < r + 2)
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    kind = q.dtype.element_ty
    turned_first = (first * cos - second * sin).to(kind)
    turned_second = (second * cos + first * sin).to(kind)
    query = q + (place * r + head) * 2 * half + column
    tl.store(query, turned_first, mask=there & (head < r))
    tl.store(query + half, turned_second, mask=there & (head < r))
    key = k + place * 2 * half + column + head * 0
    tl.store(key, turned_first, mask=there & (head == r))
    tl.store(key + half, turned_second, mask=there & (head == r))
    value = v + place * 2 * half + column + head * 0
    tl.store(value, first.to(kind), mask=there & (head == r + 1))
    tl.store(value + half, second.to(kind), mask=there & (head == r + 1))


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
    there = (token < rows)[:, None, None]
    cos, sin = _angles(freqs, tl.minimum(token, rows - 1), batch, column, half)
    place = (token.to(tl.int64) * groups + tl.program_id(1))[:, None, None]
    column = column[None, None, :]
    query = d_q + (place * r + head) * 2 * half + column
    key = d_k + place * 2 * half + column + head * 0
    value = d_v + place * 2 * half + column + head * 0
    is_query, is_key, is_value = there & (head < r), there & (head == r), there & (head == r + 1)
    first = tl.load(query, mask=is_query, other=0.0).to(tl.float32)
    first += tl.load(key, mask=is_key, other=0.0).to(tl.float32)
    second = tl.load(query + half, mask=is_query, other=0.0).to(tl.float32)
    second += tl.load(key + half, mask=is_key, other=0.0).to(tl.float32)
    value_first = tl.load(value, mask=is_value, other=0.0).to(tl.float32)
    value_second = tl.load(value + half, mask=is_value, other=0.0).to(tl.float32)
    inside = there & (head < r + 2)
    target = d_mixed + (place * (r + 2) + head) * 2 * half + column
    kind = d_mixed.dtype.element_ty
    # Where a value is, `first` and `second` are 0, and the other way round.
    tl.store(target, (first * cos + second * sin + value_first).to(kind), mask=inside)
    tl.store(target + half, (second * cos - first * sin + value_second).to(kind), mask=inside)


class QkvRope(torch.autograd.Function):
    """mixed [s, b, g, (r + 2) * d], angles float32 [s, 1, 1, d] -> queries [s, b, g * r, d], keys, values [s, b, g, d].

    In the dtype of `mixed`; computed in float32. The two halves of the angles' last axis are the same.
    """

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, freqs: torch.Tensor, r: int) -> tuple[torch.Tensor, ...]:
        """The three tensors, contiguous; nothing of `mixed` is kept."""
        s, b, g, width = mixed.shape
        d = width // (r + 2)
        mixed, freqs = mixed.contiguous(), freqs.float().contiguous()
        q = mixed.new_empty(s, b, g * r, d)
        k, v = (mixed.new_empty(s, b, g, d) for _ in range(2))
        ctx.freqs, ctx.r = freqs, r  # the angles live in Megatron-Core's cache: one tensor for all layers
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
    """Queries, keys and values: what Megatron-Core's attention calls under fused_single_qkv_rope.

    `parts`: how many of the last axis of `mixed` are a group's queries, its key and its value.
    """
    assert q_freqs is k_freqs, "Qwen turns queries and keys by the same angles"
    return QkvRope.apply(mixed, q_freqs, parts[0] // parts[1])
