"""Runs in each rank: `python -m common.train` whose layers communicate piece by piece, with what stands first changed.

    python -m tests.distributed.exchange_worker linears --tp=2 ...

`linears`: all four linear layers. `products`: the MLP is one product. The others are mistakes, each of which must be
far outside of the tests' bound.
"""

import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from common import errors, train
from common.engine.installation import prepare
from common.platforms import current

prepare(current())

from common.model.kernels import selection  # noqa: E402  imports Megatron-Core, which is prepared first
from common.model.layers.gated_mlp import TorchProducts  # noqa: E402
from tests.distributed.gloo_exchange import Gathered, GlooExchange, Summed  # noqa: E402


def without_sum(self: Summed) -> torch.Tensor:
    """Each rank's own addend alone."""
    return self.values.chunk(self.exchange.size)[self.exchange.rank].contiguous()


def in_own_order(self: Gathered) -> Any:
    """All ranks' tokens as if this rank's stood first."""
    return zip([slice(*each) for each in _bounds(self)], self.values.chunk(self.exchange.size), strict=True)


def _bounds(self: Gathered) -> list[tuple[int, int]]:
    rows, size = len(self.values) // self.exchange.size, self.exchange.size
    ranks = [(self.exchange.rank + step) % size for step in range(size)]
    return [(rank * rows, (rank + 1) * rows) for rank in ranks]


CHANGES: dict[str, list[tuple[Any, str, Any]]] = {
    "linears": [],
    "products": [(selection, "mlp_products", lambda *_: TorchProducts())],
    "without the sum": [(Summed, "total", without_sum)],
    "in its own order": [(Gathered, "pieces", in_own_order)],
}


def main() -> None:
    """Trains with the change that the first argument names."""
    changes = [(selection, "tp_exchange", lambda *_: GlooExchange()), *CHANGES[sys.argv.pop(1)]]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        errors.run(train.main)


if __name__ == "__main__":
    main()
