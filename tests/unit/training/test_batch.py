"""A rank's batch of the rows it read: bounds of joined rows, and its part under context parallelism."""

import pytest
import torch

from common.model.layers.context_parallel import context_parallel_slice, ranks_of_rows, rows_of_ranks
from common.model.layers.documents import packed_seq_params


def test_segments_begin_where_their_number_changes_and_at_each_row() -> None:
    bounds = packed_seq_params(torch.tensor([[0, 0, 1, 2], [2, 2, 3, 3]]))  # adjacent rows may have the same number
    assert bounds.cu_seqlens_q.tolist() == bounds.cu_seqlens_kv.tolist() == [0, 2, 3, 4, 6, 8]
    assert bounds.cu_seqlens_q.dtype == torch.int32
    assert (bounds.qkv_format, bounds.max_seqlen_q, bounds.max_seqlen_kv) == ("thd", 4, 4)


def test_context_parallel_ranks_share_the_row_and_the_work() -> None:
    rows = torch.arange(16).reshape(2, 8)
    parts = [context_parallel_slice(rows, 2, rank) for rank in range(2)]
    assert parts[0].tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert parts[1].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]


def transformer_engines_indices(cu_seqlens: list[int], cp_size: int, cp_rank: int) -> list[int]:
    """thd_get_partitioned_indices as Transformer Engine documents it: of each sequence the two chunks of a rank."""
    found: list[int] = []
    for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False):
        chunk = (end - start) // (2 * cp_size)
        for number in (cp_rank, 2 * cp_size - cp_rank - 1):
            found += range(start + number * chunk, start + (number + 1) * chunk)
    return found


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_rows_are_cut_as_transformer_engine_cuts_sequences(cp_size: int) -> None:
    positions = torch.arange(2 * 24).reshape(2, 24)
    for rank in range(cp_size):
        mine = context_parallel_slice(positions, cp_size, rank)
        assert mine.flatten().tolist() == transformer_engines_indices([0, 24, 48], cp_size, rank)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_gathered_chunks_are_put_into_the_order_of_the_row_and_back(cp_size: int) -> None:
    rows = torch.arange(2 * 16 * 3).reshape(2, 16, 3)
    ranks = torch.stack([context_parallel_slice(rows, cp_size, rank) for rank in range(cp_size)])
    assert torch.equal(rows_of_ranks(ranks), rows)
    assert torch.equal(ranks_of_rows(rows, cp_size), ranks)
