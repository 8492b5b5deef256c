"""Staging of a rank's state in host memory before it is written: block by block, or a full copy."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from common.training.state.host_memory import staging_buffer

BLOCK_BYTES = 16 << 20
NUM_PINNED_BLOCKS = 4
ALIGNMENT = 64

Pending = deque[tuple[Tensor, torch.cuda.Event]]


def iter_blocks(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of contiguous `tensors` in blocks; a device's come through pinned buffers, copied ahead of the reader.

    A block is valid until the next one is requested.
    """
    ring: list[Tensor] = []
    pending: Pending = deque()
    for chunk in _chunks(tensors):
        if not chunk.is_cuda:
            yield from _drain(pending)
            yield chunk.numpy().data
            continue
        if len(ring) < NUM_PINNED_BLOCKS:
            ring.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True))
        slot = ring.pop(0)
        ring.append(slot)
        slot = slot[: chunk.numel()]
        slot.copy_(chunk, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        pending.append((slot, event))
        if len(pending) == NUM_PINNED_BLOCKS - 1:
            yield _pop(pending)
    yield from _drain(pending)


def _chunks(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        data = tensor.detach().reshape(-1).view(torch.uint8)
        yield from data.split(BLOCK_BYTES)


def _pop(pending: Pending) -> memoryview:
    slot, event = pending.popleft()
    event.synchronize()
    return slot.numpy().data


def _drain(pending: Pending) -> Iterator[memoryview]:
    while pending:
        yield _pop(pending)


class StagingBuffer:
    """Host memory that a rank's state is copied to, allocated once, and pinned where the state is on a GPU."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def allocate(self, tensors: Sequence[Tensor]) -> Tensor:
        """The buffer, [n] uint8, with room for `tensors`; raises KitError if the host lacks the memory."""
        size = max(1, sum(_aligned(tensor.nbytes) for tensor in tensors))
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            self._buffer = staging_buffer(size, pinned=any(tensor.is_cuda for tensor in tensors))
        return self._buffer

    def stage(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of `tensors` in the buffer, valid until the next call; returns when they are complete."""
        buffer, start, copies = self.allocate(tensors), 0, []
        for tensor in tensors:
            copy = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor.detach(), non_blocking=True)
            copies.append(copy)
            start += _aligned(tensor.nbytes)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return copies


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
