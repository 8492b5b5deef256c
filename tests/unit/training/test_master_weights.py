"""float32 master weights kept as 16 bits beside the bf16 weights: nothing is lost, and nothing wrong is taken."""

import pytest
import torch

from common.errors import KitError
from common.training.checkpointing.staging import BLOCK_BYTES, StagingBuffer, iter_blocks
from common.training.state.master_weights import MasterWeights, merge, remainders, split

LOWER = [0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF]


def every_master() -> torch.Tensor:
    """All upper halves of finite numbers that do not round to infinity, with lower halves about each edge."""
    upper = torch.arange(1 << 16, dtype=torch.int64)
    finite = upper[(upper & 0x7FFF) < 0x7F7F]
    bits = ((finite[:, None] << 16) | torch.tensor(LOWER)).view(-1)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def test_weight_and_remainder_are_the_master_to_the_bit() -> None:
    master = every_master()
    weight, remainder = split(master)
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(merge(weight, remainder).view(torch.int32), master.view(torch.int32))
    assert torch.equal(remainders(master, weight), remainder)
    ties = master.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(weight[~ties].view(torch.int16), master.bfloat16()[~ties].view(torch.int16))


def test_a_tie_that_another_optimizer_rounded_to_even_loses_one_unit_in_the_last_place() -> None:
    master = every_master()
    weight = master.bfloat16()  # to the nearest, ties to even
    lost = master.view(torch.int32) - merge(weight, remainders(master, weight)).view(torch.int32)
    down = (master.view(torch.int32) & 0x1FFFF) == 0x8000  # even, and the tie above it
    assert torch.equal(lost, down.to(torch.int32)) and down.sum() > 30_000


@pytest.mark.parametrize("wrong", [1.01, -1.0, float("nan")])
def test_masters_of_other_weights_are_refused(wrong: float) -> None:
    weight = torch.full((3, 4), 1.0, dtype=torch.bfloat16)
    master = weight.float()
    master[1, 2] = wrong
    with pytest.raises(KitError, match=f"1 of 12 master weights .* for example {wrong:g} and 1: "):
        MasterWeights(weight, torch.zeros(3, 4, dtype=torch.int16)).copy_(master)


def test_masters_are_saved_block_by_block_and_loaded_in_parts() -> None:
    torch.manual_seed(1)
    master = torch.randn(5, 3 * BLOCK_BYTES // 16)
    weight, remainder = split(master)
    masters = MasterWeights(weight, torch.zeros_like(remainder))
    for rows in (slice(3, 5), slice(0, 3)):
        masters[rows, :][(slice(None), slice(0, 7))].copy_(master[rows, :7])
        masters[rows, 7:].copy_(master[rows, 7:])
    expected = master.numpy().tobytes()
    blocks = [bytes(block) for block in iter_blocks([masters, torch.arange(3)])]
    assert b"".join(blocks) == expected + torch.arange(3).numpy().tobytes()
    assert len(blocks) == 5 and masters.nbytes == len(expected)
    first, last = StagingBuffer().stage([masters, torch.arange(3)])
    assert torch.equal(first, master) and torch.equal(last, torch.arange(3))
