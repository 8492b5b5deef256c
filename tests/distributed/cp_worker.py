"""Runs in each rank: `python -m common.train` with one thing of context parallelism changed, which stands first.

    python -m tests.distributed.cp_worker long --cp=2 ...

`blocks`: a document's last queries attend to it in several blocks, as in chunks of more than 8192 positions. The others
are mistakes, each of which must be far outside of the tests' bound.
"""

import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from common import errors, train
from common.model.layers import attention, context_parallel, documents


def own_gradients_alone(ctx: Any, *upstream: torch.Tensor) -> Any:
    """Of the keys only what this rank's queries give: as without the reduce-scatter."""
    ranks = context_parallel.ranks_of_rows(torch.stack(upstream), ctx.group.size())
    mine = ranks[ctx.group.rank()]
    return mine[0], mine[1], None


def in_rank_order(ranks: torch.Tensor) -> torch.Tensor:
    """The keys as they were gathered, not in the order of the row."""
    return ranks.transpose(0, 1).flatten(1, 2)


def as_first_rank(cp_size: int, _: int) -> tuple[int, int]:
    """Every rank takes its queries for rank 0's."""
    return context_parallel.chunk_numbers(cp_size, 0)


def as_one_document(offsets: list[int], start: int, end: int) -> Any:
    """Attention beyond the beginning of a document."""
    return documents.documents_of_chunk([0, offsets[-1]], start, end)


CHANGES: dict[str, list[tuple[Any, str, Any]]] = {
    "blocks": [(attention, "MASK_ELEMENTS", 400)],
    "own gradients alone": [(context_parallel._GatherRows, "backward", staticmethod(own_gradients_alone))],
    "keys in rank order": [(context_parallel, "rows_of_ranks", in_rank_order)],
    "as the first rank": [(attention, "chunk_numbers", as_first_rank)],
    "one document": [(attention, "documents_of_chunk", as_one_document)],
}


def main() -> None:
    """Trains with the change that the first argument names."""
    with ExitStack() as stack:
        for owner, name, value in CHANGES[sys.argv.pop(1)]:
            stack.enter_context(patch.object(owner, name, value))
        errors.run(train.main)


if __name__ == "__main__":
    main()
