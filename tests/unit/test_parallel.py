"""How a run's GPUs are divided, and which divisions are refused."""

import re

import pytest

from common.errors import KitError
from common.parallel import ParallelSizes


def test_replicas_take_the_ranks_that_are_left() -> None:
    assert ParallelSizes(1).dp == 1
    assert ParallelSizes(16, tp=2, pp=2, vpp=2, cp=2).dp == 2
    assert ParallelSizes(8, tp=2, pp=4).dp == 1


def test_micro_batches_of_a_replica_fill_the_global_batch() -> None:
    sizes = ParallelSizes(8, tp=2, pp=2)
    assert sizes.num_microbatches(16, 2) == 4
    assert sizes.num_microbatches(16, 8) == 1
    assert sizes.num_microbatches(16, 2) * 2 * sizes.dp == 16


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"world_size": 8, "tp": 3}, "8 GPUs (GPUS x NNODES) cannot be divided by TP=3 x PP=1 x CP=1 = 3: change GPUS"),
        ({"world_size": 8, "tp": 4, "pp": 4}, "TP=4 x PP=4 x CP=1 = 16"),
        ({"world_size": 4, "cp": 3}, "TP=1 x PP=1 x CP=3 = 3"),
        ({"world_size": 8, "tp": 0}, "TP=0: it must be at least 1"),
        ({"world_size": 8, "pp": -1}, "PP=-1: it must be at least 1"),
        ({"world_size": 0}, "WORLD_SIZE=0: it must be at least 1"),
        ({"world_size": 8, "vpp": 2}, "VPP=2 needs pipeline stages, but PP=1: set PP to 2 or more, or VPP=1"),
    ],
)
def test_impossible_sizes_are_refused_with_value_rule_and_remedy(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(KitError, match=re.escape(message)):
        ParallelSizes(**sizes)


@pytest.mark.parametrize("global_batch_size, micro_batch_size", [(12, 4), (6, 2), (2, 2), (15, 1)])
def test_a_global_batch_that_does_not_divide_is_refused(global_batch_size: int, micro_batch_size: int) -> None:
    message = (
        f"GLOBAL_BATCH_SIZE={global_batch_size} cannot be divided by MICRO_BATCH_SIZE={micro_batch_size}"
        f" x 2 data-parallel replicas: make it a multiple of {2 * micro_batch_size}"
    )
    with pytest.raises(KitError, match=re.escape(message)):
        ParallelSizes(8, tp=2, pp=2).num_microbatches(global_batch_size, micro_batch_size)
