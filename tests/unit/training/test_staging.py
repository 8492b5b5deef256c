"""A rank's state staged for the disk: every byte, in order, on a CPU; tests/gpu saves through the pinned ring."""

import torch

from common.training.checkpointing.staging import ALIGNMENT, BLOCK_BYTES, StagingBuffer, iter_blocks

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
