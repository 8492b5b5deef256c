"""A rank's state on its way to the disk: every byte, in order, on a CPU; tests/gpu saves through the pinned ring."""

import torch

from common.training.state.staging import ALIGNMENT, BLOCK_BYTES, HostCopy, blocks_of

TENSORS = [
    torch.arange(7, dtype=torch.float32), torch.ones((), dtype=torch.bfloat16), torch.empty(0),
    torch.arange(BLOCK_BYTES // 4 + 1000, dtype=torch.int32), torch.full((3, 5), 2.0, dtype=torch.bfloat16),
]  # fmt: skip


def bytes_of(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)


def test_blocks_are_the_bytes_one_after_the_other() -> None:
    blocks = [bytes(block) for block in blocks_of(TENSORS)]
    assert b"".join(blocks) == bytes_of(TENSORS) and max(map(len, blocks)) == BLOCK_BYTES


def test_a_copy_holds_what_was_there_and_its_memory_is_made_once() -> None:
    host, tensors = HostCopy(), [tensor.clone() for tensor in TENSORS]
    buffer = host.prepare(tensors)
    assert 0 <= buffer.numel() - len(bytes_of(tensors)) < ALIGNMENT * len(tensors)
    copies = host.copy(tensors)
    tensors[0].fill_(9)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, TENSORS, strict=True))
    again = host.copy(tensors)
    assert again[0].data_ptr() == copies[0].data_ptr() == buffer.data_ptr() and again[0][0] == 9
