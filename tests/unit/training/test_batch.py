"""A rank's batch of the rows it read: bounds of joined rows, and its part under context parallelism."""

import torch

from common.model.layers.attention import packed_seq_params
from common.training.loop.batch import context_parallel_slice


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
