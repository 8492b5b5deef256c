"""Every rank learns of a stop and of a loss that is not finite from the all-reduce of the gradient norm."""

from tests.distributed.launch import worker


def test_the_norm_is_megatrons_and_one_rank_suffices_for_each_flag() -> None:
    worker(3, {}, "agreement_worker")
