"""Micro-batches sent by the rank of a tensor-parallel group that reads them to the others of the group.

They are sent from host to host, by gloo: the bounds of packed segments, the numbers of pairs and the padding are needed
on the host, which would have to wait for the GPU if they came over NCCL. A rank sends or receives just before the
forward pass of the micro-batch, whose collectives the same ranks call next in the same order, so pipeline communication
cannot deadlock with it where it cannot with those.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.data.dataset.data_loader import Batch
from common.errors import KitError
from common.training.launching.hang_detector import WAITING_FOR_DATA, Heartbeat

ALIGNMENT = 8  # bytes, for a tensor of any dtype
LAUNCHER_S = 10  # in which the launcher ends a rank after it has seen another one fail


class Entry(NamedTuple):
    """An entry of every micro-batch, and where it lies in the bytes that are sent."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    end: int


def send_each(batches: Iterator[Batch], group: Any) -> Iterator[Batch]:
    """`batches`, each sent to the other ranks of `group`, of which this rank is the first, before it is yielded."""
    layout: list[Entry] = []
    for batch in batches:
        if not layout:
            layout = layout_of(batch)
            dist.broadcast_object_list([layout], dist.get_rank(), group)
        dist.broadcast(pack(batch, layout), dist.get_rank(), group)
        yield batch


def receive_each(reader: int, group: Any, heartbeat: Heartbeat) -> Iterator[Batch]:
    """The micro-batches that global rank `reader` sends; raises KitError if it has ended."""
    layout: list[Entry] = []
    while True:
        heartbeat.activity = WAITING_FOR_DATA
        try:
            if not layout:
                box: list[Any] = [None]
                dist.broadcast_object_list(box, reader, group)
                layout = box[0]
            packed = torch.empty(layout[-1].end, dtype=torch.uint8)
            dist.broadcast(packed, reader, group)
        except RuntimeError as error:
            time.sleep(LAUNCHER_S)  # so that the log ends with the reader's own error
            raise KitError(f"rank {reader}, which reads the data of this rank, has ended: see its error") from error
        yield unpack(packed, layout)


def layout_of(batch: Batch) -> list[Entry]:
    """The entries of `batch`, one after the other."""
    layout, start = list[Entry](), 0
    for name, tensor in batch.items():
        start = -(-start // ALIGNMENT) * ALIGNMENT
        layout.append(Entry(name, tensor.dtype, tensor.shape, start, start + tensor.nbytes))
        start = layout[-1].end
    return layout


def pack(batch: Batch, layout: list[Entry]) -> torch.Tensor:
    """The bytes of `batch`, uint8 [size of `layout`]."""
    assert layout_of(batch) == layout, "every micro-batch has the same entries and sizes"
    packed = torch.empty(layout[-1].end, dtype=torch.uint8)
    for each in layout:
        packed[each.start : each.end].view(each.dtype).view(each.shape).copy_(batch[each.name])
    return packed


def unpack(packed: torch.Tensor, layout: list[Entry]) -> Batch:
    """The micro-batch that `pack` took; its tensors share the memory of `packed`."""
    return {each.name: packed[each.start : each.end].view(each.dtype).view(each.shape) for each in layout}
