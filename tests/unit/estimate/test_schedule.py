"""The order of passes in a pipeline, and the micro-batches in flight."""

import itertools
import operator
from collections.abc import Iterable

import pytest

from common.estimate.schedule import Moment, fullest_moments, moments


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


@pytest.mark.parametrize(("pp", "vpp", "number"), [(1, 1, 3), (4, 1, 6), (4, 1, 2), (2, 2, 8), (4, 3, 8), (2, 4, 6)])
def test_the_most_bytes_are_held_in_one_of_the_fullest_moments(pp: int, vpp: int, number: int) -> None:
    """Whatever a micro-batch holds in each chunk, for each chunk's passes forward and backward."""
    for rank, sizes in itertools.product(range(pp), itertools.product((0, 1, 7), repeat=vpp)):
        every, few = list(moments(pp, vpp, rank, number)), fullest_moments(pp, vpp, rank, number)
        assert len({*few}) == len(few) and {*few} <= {*every}

        def most(found: Iterable[Moment], sizes: tuple[int, ...] = sizes) -> dict[tuple[bool, int], int]:
            held: dict[tuple[bool, int], int] = {}
            for forward, chunk, in_flight in found:
                total = sum(map(operator.mul, in_flight, sizes))
                held[forward, chunk] = max(held.get((forward, chunk), 0), total)
            return held

        assert most(few) == most(every)
    assert len(fullest_moments(4, 1, 0, 16)) == 2, "the rest of a step's passes is left out"
