"""A rank's state on its way to the disk: through a few pinned buffers, or all of it into one that is kept."""

import mmap
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from common.errors import KitError
from common.training.state.transfers import pin

BLOCK_BYTES = 16 << 20
RING = 4
ALIGNMENT = 64


def blocks_of(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of contiguous `tensors`, each in blocks: of a device through RING pinned buffers, ahead of the reader.

    A block may be looked at until the next one is asked for.
    """
    ring: list[Tensor] = []
    waiting: deque[tuple[Tensor, torch.cuda.Event]] = deque()
    for piece in _pieces(tensors):
        if not piece.is_cuda:
            yield from _drained(waiting)
            yield piece.numpy().data
            continue
        if len(ring) < RING:
            ring.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True))
        slot = ring.pop(0)
        ring.append(slot)
        slot = slot[: piece.numel()]
        slot.copy_(piece, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        waiting.append((slot, event))
        if len(waiting) == RING - 1:
            yield _next(waiting)
    yield from _drained(waiting)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        data = tensor.detach().reshape(-1).view(torch.uint8)
        yield from data.split(BLOCK_BYTES)


def _next(waiting: "deque[tuple[Tensor, torch.cuda.Event]]") -> memoryview:
    slot, event = waiting.popleft()
    event.synchronize()
    return slot.numpy().data


def _drained(waiting: "deque[tuple[Tensor, torch.cuda.Event]]") -> Iterator[memoryview]:
    while waiting:
        yield _next(waiting)


class HostCopy:
    """A buffer of the host's memory that a rank's state is copied to, made once and pinned where there is a GPU."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def prepare(self, tensors: Sequence[Tensor]) -> Tensor:
        """The buffer, [n] uint8, with room for `tensors`; raises KitError where the host has not the memory."""
        size = max(1, sum(_up(tensor.nbytes) for tensor in tensors))
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            self._buffer = _memory(size, pinned=any(tensor.is_cuda for tensor in tensors))
        return self._buffer

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors` in the buffer, which holds them until the next call. Returns when all is there."""
        buffer, start, copies = self.prepare(tensors), 0, []
        for tensor in tensors:
            place = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor.detach(), non_blocking=True)
            copies.append(place)
            start += _up(tensor.nbytes)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return copies


def _memory(size: int, *, pinned: bool) -> Tensor:
    way_out = "use more nodes, or ASYNC_SAVE=false"
    try:
        # Large pages: a page fault for every 4 KiB of a copy takes longer than the copy.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise KitError(f"ASYNC_SAVE=true: no {size / 2**30:.1f} GiB of memory ({error.strerror}): {way_out}") from error
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    for part in buffer.split(1 << 30):
        part.zero_()  # its pages are there before they are pinned, which keeps the device waiting
    if pinned:
        pin(buffer, "ASYNC_SAVE=true", way_out)
    return buffer


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
