"""Rows of several documents, each attending to itself: their bounds, as attention takes them.

Letters: b micro-batch, s sequence.
"""

from bisect import bisect_left, bisect_right
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from common.model.shape.masks import takes_mask


def packed_seq_params(segment_ids: torch.Tensor) -> PackedSeqParams:
    """Megatron-Core's PackedSeqParams in the "thd" format, for the rows of [b, s] concatenated to one of b * s tokens.

    `segment_ids` int [b, s], on the CPU, numbers the documents of a row. cu_seqlens is int32 [segments + 1] on the CPU.
    max_seqlen is the length of a row, since cuDNN builds a new plan for every other value.
    """
    row_length = segment_ids.shape[1]
    flat = segment_ids.flatten()
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[1:] = flat[1:] != flat[:-1]
    begins[::row_length] = True
    offsets = torch.cat([begins.nonzero().flatten(), torch.tensor([flat.numel()])]).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=row_length,
        max_seqlen_kv=row_length,
    )


def separation(segment_ids: torch.Tensor, device: torch.device, cp_size: int = 1) -> torch.Tensor:
    """What keeps attention within the documents of a row: the attention_mask of SdpaAttention.

    `segment_ids` int [b, s], on the CPU, numbers the documents of whole rows; RoPE is relative, so positions need no
    restart. A mask bool [b, 1, s, s] on `device`, True where position i must not attend to j: another segment, or j
    after i. Where `takes_mask` says no, the cu_seqlens of `packed_seq_params`, on the CPU.
    """
    rows, length = segment_ids.shape
    if not takes_mask(rows, length, cp_size):
        offsets: torch.Tensor = packed_seq_params(segment_ids).cu_seqlens_q
        return offsets
    segment_ids = segment_ids.to(device, non_blocking=True)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return ~(same & causal)[:, None]


def offsets_of_rows(cu_seqlens: list[int], length: int, num_rows: int) -> list[list[int]]:
    """The offsets of each row's documents, within it, from those of `num_rows` joined rows of `length`."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for offset in cu_seqlens[:-1]:
        rows[offset // length].append(offset % length)
    return [[*row, length] for row in rows]


def documents_of_chunk(offsets: list[int], start: int, end: int) -> tuple[int, list[int], list[int]]:
    """(first key, queries of each document, keys of each) for the queries [start, end) of a row.

    `offsets` are where the row's documents begin, and its end. Only the first document may have begun before `start`,
    so it alone may have more keys than queries; the keys of all of them are [first key, end).

        offsets 0 3 10 16, queries [4, 12)    first key 3, queries 6 2, keys 7 2
    """
    first = bisect_right(offsets, start) - 1
    edges = [start, *offsets[first + 1 : bisect_left(offsets, end)], end]
    queries = [after - before for before, after in pairwise(edges)]
    return offsets[first], queries, [edges[1] - offsets[first], *queries[1:]]
