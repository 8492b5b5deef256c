"""An Exchange over any backend, in collectives that are complete before a piece is used."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


class GlooExchange:
    """As common.model.layers.exchange.Exchange; the memory of a gathering is used again by the second one after it."""

    def __init__(self) -> None:
        self.group: Any = parallel_state.get_tensor_model_parallel_group()
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.slots: list[torch.Tensor | None] = [None, None]

    def gather(self, part: torch.Tensor) -> "Gathered":
        assert part.is_contiguous()
        whole = torch.cat([part] * self.size)
        dist.all_gather(list(whole.chunk(self.size)), part, group=self.group)
        if self.slots[0] is not None:
            self.slots[0].fill_(float("nan"))
        self.slots = [self.slots[1], whole]
        return Gathered(self, whole)

    def scatter(self, rows: int, width: int, like: torch.Tensor) -> "Summed":
        return Summed(self, like.new_full((rows, width), float("nan")))


class Gathered:
    def __init__(self, exchange: GlooExchange, whole: torch.Tensor) -> None:
        self.exchange, self.values = exchange, whole

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        rows = len(self.values) // self.exchange.size
        for step in range(self.exchange.size):
            rank = (self.exchange.rank + step) % self.exchange.size
            yield slice(rank * rows, (rank + 1) * rows), self.values[rank * rows : (rank + 1) * rows]

    blocks = pieces


class Summed:
    def __init__(self, exchange: GlooExchange, whole: torch.Tensor) -> None:
        self.exchange, self.values = exchange, whole

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        rows = len(self.values) // self.exchange.size
        for step in range(1, self.exchange.size + 1):
            rank = (self.exchange.rank - step) % self.exchange.size
            yield slice(rank * rows, (rank + 1) * rows), self.values[rank * rows : (rank + 1) * rows]

    def total(self) -> torch.Tensor:
        dist.all_reduce(self.values, group=self.exchange.group)
        return self.values.chunk(self.exchange.size)[self.exchange.rank].contiguous()
