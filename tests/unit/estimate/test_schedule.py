"""The order of passes in a pipeline, and the micro-batches in flight."""

import pytest

from common.estimate.schedule import moments


def passes(pp: int, vpp: int, rank: int, number: int) -> str:
    """The passes as F0, B0, ... with the chunk's number."""
    return " ".join(("F" if moment.forward else "B") + str(moment.chunk) for moment in moments(pp, vpp, rank, number))


def test_one_stage_runs_one_micro_batch_after_the_other() -> None:
    assert passes(1, 1, 0, 3) == "F0 B0 F0 B0 F0 B0"
    assert {moment.in_flight for moment in moments(1, 1, 0, 3)} == {(1,)}


@pytest.mark.parametrize("rank", range(4))
def test_a_stage_holds_as_many_micro_batches_as_come_after_it(rank: int) -> None:
    assert max(moment.in_flight[0] for moment in moments(4, 1, rank, 9)) == 4 - rank
    assert max(moment.in_flight[0] for moment in moments(4, 1, rank, 2)) == min(4 - rank, 2)


def test_interleaved_stages_go_through_their_chunks_in_groups() -> None:
    assert passes(2, 2, 1, 2) == "F0 F0 F1 B1 F1 B1 B0 B0"
    assert passes(2, 2, 0, 4) == "F0 F0 F1 F1 F0 B1 F0 B1 F1 B0 F1 B0 B1 B1 B0 B0"


@pytest.mark.parametrize(("pp", "vpp", "rank", "number"), [(1, 1, 0, 3), (4, 1, 1, 6), (2, 2, 0, 8), (4, 3, 2, 4)])
def test_every_forward_pass_has_its_backward_pass(pp: int, vpp: int, rank: int, number: int) -> None:
    all_moments = list(moments(pp, vpp, rank, number))
    for chunk in range(vpp):
        assert sum(moment.forward for moment in all_moments if moment.chunk == chunk) == number
        assert sum(not moment.forward for moment in all_moments if moment.chunk == chunk) == number
    assert all(min(moment.in_flight) >= 0 and moment.in_flight[moment.chunk] > 0 for moment in all_moments)
    assert all_moments[-1].in_flight == tuple(int(chunk == 0) for chunk in range(vpp))
