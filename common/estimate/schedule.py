"""The micro-batches in flight on a pipeline rank, pass by pass of the schedule."""

import operator
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class Moment(NamedTuple):
    """A chunk's forward or backward pass, and the number of micro-batches in flight in each chunk, its own included."""

    forward: bool
    chunk: int
    in_flight: tuple[int, ...]


def moments(pp: int, vpp: int, pp_rank: int, num_microbatches: int) -> Iterator[Moment]:
    """The passes of a rank in one step, as Megatron-Core's schedules order them.

    Without VPP: pp - 1 - rank warm-up forward passes, then 1F1B. With it (interleaved 1F1B): groups of PP micro-batches
    pass through one chunk after the other, in reverse order for backward, after 2 (pp - 1 - rank) + (vpp - 1) pp
    warm-up passes. Source: arXiv 2104.04473, section 2.2; megatron/core/pipeline_parallel/schedules.py.
    """
    total = num_microbatches * vpp
    warm_up = pp - 1 - pp_rank if vpp == 1 else 2 * (pp - 1 - pp_rank) + (vpp - 1) * pp
    warm_up = min(warm_up, total) if pp > 1 else 0
    in_flight: Counter[int] = Counter()
    for step in range(total + warm_up):
        if step < total:
            chunk = _chunk_of(step, pp, vpp)
            in_flight[chunk] += 1
            yield Moment(True, chunk, tuple(in_flight[index] for index in range(vpp)))
        if step >= warm_up:
            chunk = vpp - 1 - _chunk_of(step - warm_up, pp, vpp)
            yield Moment(False, chunk, tuple(in_flight[index] for index in range(vpp)))
            in_flight[chunk] -= 1


@cache
def fullest_moments(pp: int, vpp: int, pp_rank: int, num_microbatches: int) -> tuple[Moment, ...]:
    """Those of `moments` of which no other pass of that kind and chunk has as many in flight in every chunk.

    Each of them once. Whatever a micro-batch takes in each chunk, what takes the most memory is among them.
    """
    fullest: dict[tuple[bool, int], list[Moment]] = {}
    for moment in dict.fromkeys(moments(pp, vpp, pp_rank, num_microbatches)):
        others = fullest.setdefault((moment.forward, moment.chunk), [])
        if not any(_covers(other, moment) for other in others):
            others[:] = [*(other for other in others if not _covers(moment, other)), moment]
    return tuple(moment for alike in fullest.values() for moment in alike)


def _covers(one: Moment, other: Moment) -> bool:
    """Whether `one` has at least as many micro-batches in flight in each chunk."""
    return all(map(operator.ge, one.in_flight, other.in_flight))


def _chunk_of(step: int, pp: int, vpp: int) -> int:
    """The chunk of the `step`-th forward pass: PP micro-batches each, from the first chunk to the last."""
    return step // pp % vpp
