"""A rank's state staged for the disk: every byte, in order. The pinned ring is tried with copies that come early, late
and wrong; with a GPU's own, and tensors of a real size, in tests/gpu/test_saving.py."""

from collections.abc import Callable, Sequence

import pytest
import torch

from common.training.checkpointing.staging import (
    ALIGNMENT,
    BLOCK_BYTES,
    NUM_PINNED_BLOCKS,
    PinnedRing,
    StagingBuffer,
    iter_blocks,
)

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]

TENSORS = [
    torch.arange(7, dtype=torch.float32), torch.ones((), dtype=torch.bfloat16), torch.empty(0),
    torch.arange(BLOCK_BYTES // 4 + 1000, dtype=torch.int32), torch.full((3, 5), 2.0, dtype=torch.bfloat16),
]  # fmt: skip


def bytes_of(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)


def test_blocks_are_the_bytes_one_after_the_other() -> None:
    blocks = [bytes(block) for block in iter_blocks(TENSORS)]
    assert b"".join(blocks) == bytes_of(TENSORS) and max(map(len, blocks)) == BLOCK_BYTES


def test_a_copy_holds_the_values_and_its_memory_is_allocated_once() -> None:
    staging, tensors = StagingBuffer(), [tensor.clone() for tensor in TENSORS]
    buffer = staging.allocate(tensors)
    assert 0 <= buffer.numel() - len(bytes_of(tensors)) < ALIGNMENT * len(tensors)
    copies = staging.stage(tensors)
    tensors[0].fill_(9)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, TENSORS, strict=True))
    again = staging.stage(tensors)
    assert again[0].data_ptr() == copies[0].data_ptr() == buffer.data_ptr() and again[0][0] == 9


def through(ring: PinnedRing, chunks: list[torch.Tensor]) -> list[bytes]:
    """What a reader gets that looks at each block before it asks for the next."""
    blocks = [bytes(block) for chunk in chunks for block in ring.push(chunk)]
    return blocks + [bytes(block) for block in ring.drain()]


class Stream:
    """A device's stream: copies in order, at once, or when one is waited for, with those before it or all there are."""

    def __init__(self, when: str) -> None:
        self.when, self.queue = when, list[Pairs]()
        self.done = 0

    def run(self, until: int) -> None:
        for pairs in self.queue[self.done : until]:
            for target, source in pairs:
                target.copy_(source)
        self.done = max(self.done, until)

    def copy(self, pairs: Pairs) -> Callable[[], None]:
        self.queue.append(pairs)
        number = len(self.queue)
        if self.when == "at once":
            self.run(number)
        return lambda: self.run(number if self.when == "at the last moment" else len(self.queue))


@pytest.mark.parametrize("when", ["at once", "at the last moment", "with all that are queued"])
@pytest.mark.parametrize("number", [1, 2, 3, NUM_PINNED_BLOCKS, NUM_PINNED_BLOCKS + 1, 23])
def test_the_ring_keeps_each_block_until_it_was_read(when: str, number: int) -> None:
    sizes = [BLOCK_BYTES if i % 5 == 0 else 1000 + i for i in range(number)]
    chunks = [torch.full((size,), i + 1, dtype=torch.uint8) for i, size in enumerate(sizes)]
    assert through(PinnedRing(Stream(when).copy), chunks) == [bytes(chunk.numpy()) for chunk in chunks]


def test_a_block_that_is_not_the_devices_is_refused() -> None:
    def copy(pairs: Pairs) -> Callable[[], None]:
        """As into a slot that another copy was still on its way to."""
        (slot, chunk), (sample, source) = pairs
        slot.copy_(chunk + (chunk[0] == 3))
        sample.copy_(source)
        return lambda: None

    chunks = [torch.full((5000,), i, dtype=torch.uint8) for i in range(6)]
    with pytest.raises(OSError, match="not what the device holds"):
        through(PinnedRing(copy), chunks)
    assert len(through(PinnedRing(copy), chunks[:3])) == 3
