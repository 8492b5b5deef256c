"""Context parallelism by gathered keys and values: a rank's queries attend to the keys of the whole row.

Of 2 * CP equal chunks of a row, rank r has number r and its mirror from the end, which balances causal attention over
the ranks, and is the order that Transformer Engine's attention expects too (get_batch_on_this_cp_rank in
Megatron-Core's utils.py). Rows of several documents are cut at the same places: they are the same at any CP.

    CP=2    chunk   0 1 2 3
            rank    0 1 1 0

Source: Llama 3, arXiv 2407.21783, section 3.3.2. Letters: s length of a row, b micro-batch, g query groups, d head
size.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def chunk_numbers(cp_size: int, cp_rank: int) -> tuple[int, int]:
    """The two of a row's 2 * cp_size chunks that a rank has."""
    return cp_rank, 2 * cp_size - 1 - cp_rank


def context_parallel_slice(tensor: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """[b, s / cp_size] of [b, s]: the rank's two chunks, one after the other."""
    chunks = tensor.unflatten(1, (2 * cp_size, -1))
    return torch.cat([chunks[:, number] for number in chunk_numbers(cp_size, cp_rank)], dim=1)


def gather_rows(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [s, b, g, d] of whole rows from this rank's [s / cp, b, g, d]. A collective call.

    So is the backward pass, which sums the gradients of all ranks' queries.
    """
    rows: tuple[torch.Tensor, torch.Tensor] = _GatherRows.apply(key, value, parallel_state.get_context_parallel_group())
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: torch.Tensor, value: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.group = group
        mine = torch.stack([key, value])
        ranks = mine.new_empty(group.size(), *mine.shape)
        dist.all_gather_into_tensor(ranks.view(-1), mine.view(-1), group=group)
        keys, values = rows_of_ranks(ranks).unbind(0)
        return keys, values

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ranks = ranks_of_rows(torch.stack(upstream), ctx.group.size())
        mine = torch.empty_like(ranks[0])
        dist.reduce_scatter_tensor(mine.view(-1), ranks.view(-1), group=ctx.group)
        return mine[0], mine[1], None


def rows_of_ranks(ranks: torch.Tensor) -> torch.Tensor:
    """[2, s, ...] in the order of the row, from all ranks' chunks [cp, 2, s / cp, ...]."""
    halves = ranks.unflatten(2, (2, -1))
    chunks = torch.cat([halves[:, :, 0], halves[:, :, 1].flip(0)])
    return chunks.transpose(0, 1).flatten(1, 2)


def ranks_of_rows(rows: torch.Tensor, cp_size: int) -> torch.Tensor:
    """The inverse of rows_of_ranks: contiguous [cp, 2, s / cp, ...] from [2, s, ...]."""
    chunks = rows.unflatten(1, (2 * cp_size, -1)).transpose(0, 1)
    return torch.stack([chunks[:cp_size], chunks[cp_size:].flip(0)], dim=2).flatten(2, 3)
