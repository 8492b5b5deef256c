"""What a rank gets of a micro-batch: the entries its chunks use, through one buffer of bytes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.parallel import ParallelSizes
from common.training.loop.data_loading import fields_of_chunk
from common.training.loop.tp_broadcast import layout_of, pack, unpack


def plan_of(*, packing: bool = False, reset_attention: bool = False, **sizes: int) -> Any:
    settings = SimpleNamespace(packing=packing, reset_attention=reset_attention)
    return SimpleNamespace(settings=settings, sizes=ParallelSizes(**sizes))


def test_a_batch_comes_out_of_its_bytes_as_it_went_in() -> None:
    batch = {
        "num_padding": torch.tensor([3]),
        "segment_ids": torch.arange(3, dtype=torch.int32)[None],  # 12 bytes: the next one is not back to back
        "tokens": torch.tensor([[2**40, 1, -1]]),
        "loss_mask": torch.tensor([[0.25, 1.0, 0.0]]),
    }
    packed = pack(batch, layout_of(batch))
    found = unpack(packed, layout_of(batch))
    assert list(found) == list(batch) and packed.shape == (8 + 16 + 24 + 12,)
    for name, tensor in batch.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_batches_of_other_sizes_are_not_sent_as_if_they_were_alike() -> None:
    with pytest.raises(AssertionError, match="same entries and sizes"):
        pack({"tokens": torch.zeros(1, 3)}, layout_of({"tokens": torch.zeros(1, 4)}))


def test_a_chunk_gets_what_it_uses() -> None:
    first, last = {"tokens"}, {"labels", "loss_mask", "num_padding", "pairs"}
    assert fields_of_chunk(plan_of(world_size=1), 0, 0) == first | last
    four = plan_of(world_size=4, pp=4)
    assert [fields_of_chunk(four, stage, 0) for stage in range(4)] == [first, set(), set(), last]
    virtual = plan_of(world_size=4, pp=2, vpp=2, reset_attention=True)
    each = [fields_of_chunk(virtual, stage, chunk) for stage in range(2) for chunk in range(2)]
    assert each == [fields | {"segment_ids"} for fields in (first, set(), set(), last)]
    assert fields_of_chunk(plan_of(world_size=3, pp=3, packing=True), 1, 0) == {"segment_ids"}


def test_ranks_are_numbered_as_megatron_core_numbers_them() -> None:
    sizes = ParallelSizes(16, tp=2, pp=2, cp=2)
    assert [sizes.pp_rank(rank) for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]
    assert [list(sizes.tp_group(rank)) for rank in (0, 1, 6, 15)] == [[0, 1], [0, 1], [6, 7], [14, 15]]
