"""Staging of a rank's state in host memory before it is written: block by block, or a full copy.

A part of each copy's bytes is taken from the device a second time, and compared: the checksums of a checkpoint are of
what reached the host, and know nothing of a block that a fault on the way put in another's place.
"""

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from common.training.state.host_memory import ASYNC_SAVE, host_buffer
from common.training.state.master_weights import MasterWeights

BLOCK_BYTES = 16 << 20
NUM_PINNED_BLOCKS = 4
BLOCK_STRIDE = 509  # every 509th byte of a block is compared; prime, so that each byte of a number has its turn
COPY_STRIDE = 65521  # of a full copy, which training waits for
ALIGNMENT = 64

State = Tensor | MasterWeights
Copy = Callable[[Sequence[tuple[Tensor, Tensor]]], Callable[[], None]]
Pending = deque[tuple[Tensor, Tensor, Callable[[], None]]]


def copy_to_host(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Starts copies, (target, source), of the device to pinned memory; returns what blocks until they are done."""
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def iter_blocks(tensors: Iterable[State]) -> Iterator[memoryview]:
    """The bytes of contiguous `tensors` in blocks; a device's come through pinned buffers, copied ahead of the reader.

    A block is valid until the next one is requested. Raises OSError if a block is not what the device holds.
    """
    ring = PinnedRing(copy_to_host)
    for chunk in _chunks(tensors):
        if chunk.is_cuda:
            yield from ring.push(chunk)
        else:
            yield from ring.drain()
            yield chunk.numpy().data
    yield from ring.drain()


class PinnedRing:
    """A few blocks of pinned memory that chunks of a device's tensors pass through in order."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self._slots: list[Tensor] = []
        self._number = 0  # of chunks so far
        self._pending: Pending = deque()

    def push(self, chunk: Tensor) -> Iterator[memoryview]:
        """Starts to copy `chunk` [n] uint8; the oldest block if the ring is full, valid until the next call."""
        if len(self._slots) < NUM_PINNED_BLOCKS:
            self._slots.append(_pinned(BLOCK_BYTES, chunk))
        slot = self._slots[self._number % NUM_PINNED_BLOCKS][: chunk.numel()]
        self._number += 1
        source = chunk[::BLOCK_STRIDE]
        sample = _pinned(source.numel(), chunk)
        self._pending.append((slot, sample, self._copy([(slot, chunk), (sample, source)])))
        if len(self._pending) == NUM_PINNED_BLOCKS - 1:  # the block that is being read has the remaining slot
            yield self._pop()

    def drain(self) -> Iterator[memoryview]:
        """The blocks that are left."""
        while self._pending:
            yield self._pop()

    def _pop(self) -> memoryview:
        slot, sample, wait = self._pending.popleft()
        wait()
        check_copy(slot[::BLOCK_STRIDE], sample)
        return slot.numpy().data


def check_copy(copied: Tensor, sample: Tensor) -> None:
    """Raises OSError unless the bytes `copied` [n] are those of `sample` [n], taken from the device separately."""
    if not torch.equal(copied, sample):
        raise OSError(
            errno.EIO, "a copy of the state from the device to the host is not what the device holds: check the GPU"
            " and its driver's log (nvidia-smi, dmesg)"
        )  # fmt: skip


def _pinned(size: int, device_tensor: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device_tensor.is_cuda)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _chunks(tensors: Iterable[State]) -> Iterator[Tensor]:
    for tensor in tensors:
        for part in _parts(tensor):
            yield from _bytes(part).split(BLOCK_BYTES)


def _parts(tensor: State) -> Iterator[Tensor]:
    """`tensor`, or its masters block by block."""
    return iter([tensor]) if isinstance(tensor, Tensor) else tensor.blocks(BLOCK_BYTES)


class StagingBuffer:
    """Host memory that a rank's state is copied to, allocated once, and pinned where the state is on a GPU."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def allocate(self, tensors: Sequence[State]) -> Tensor:
        """The buffer, [n] uint8, with room for `tensors`; raises KitError if the host lacks the memory."""
        size = max(1, sum(_aligned(tensor.nbytes) for tensor in tensors))
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            self._buffer = host_buffer(size, *ASYNC_SAVE, pinned=any(tensor.is_cuda for tensor in tensors))
        return self._buffer

    def stage(self, tensors: Sequence[State]) -> list[Tensor]:
        """Copies of `tensors` in the buffer, valid until the next call; returns when they are complete.

        Raises OSError if a copy is not what the device holds.
        """
        buffer, start, copies, samples = self.allocate(tensors), 0, [], []
        for tensor in tensors:
            copy, at = buffer[start : start + tensor.nbytes], 0
            for part in map(_bytes, _parts(tensor)):
                target = copy[at : at + part.nbytes]
                target.copy_(part, non_blocking=True)
                if part.is_cuda:
                    samples.append((target[::COPY_STRIDE], part[::COPY_STRIDE].clone()))
                at += part.nbytes
            copies.append(copy.view(tensor.dtype).view(tensor.shape))
            start += _aligned(tensor.nbytes)
        if samples:
            torch.cuda.current_stream().synchronize()
        for copied, sample in samples:
            check_copy(copied, sample.cpu())
        return copies


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
