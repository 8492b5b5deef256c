"""PIPELINE_LAYERS of the shortest step: the last stage also computes the output layer and its loss."""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.engine.pipeline_layers import supports
from common.estimate.activations import Workload
from common.estimate.gpus import Gpu, with_rates
from common.estimate.speed import (
    chunk_costs,
    context_parallel_seconds,
    seconds,
    stages_speed,
    tensor_parallel_seconds,
)
from common.estimate.weights import Chunk, split_chunks
from common.training.settings import TrainSettings

LEAST_GAIN = 0.01  # less is not worth a layout of its own
REASON = "as the last stage also computes the output layer"


@dataclass(frozen=True)
class Ends:
    """What embedding and output layer add to the first and the last chunk, in units of a layer."""

    first: float
    last: float


@dataclass(frozen=True)
class Split:
    """A value of PIPELINE_LAYERS, and the fraction by which its steps are faster than those of even stages."""

    layers: str
    gain: float


def faster_split(settings: TrainSettings, work: Workload, gpu: Gpu, even: float | None = None) -> Split | None:
    """The split with the shortest step; None at PP=1, and where even stages are as fast or within LEAST_GAIN of it.

    `settings` have even stages; even: the seconds of their step, from a caller that has them. Whether the split fits
    the memory is not asked.
    """
    if settings.pp == 1:
        return None
    qwen, pp, vpp, rated = work.qwen, settings.pp, settings.vpp, with_rates(gpu)
    layers = balanced_layers(qwen.num_hidden_layers, pp, vpp, ends_in_layers(settings, work, rated))
    same = qwen.chunk_layers(pp, vpp)
    if layers == same:
        return None

    def step(layers: tuple[int, ...]) -> float:
        return stages_speed(settings, work, split_chunks(layers, pp), rated).step_seconds

    even, other = even or step(same), step(layers)
    return Split(",".join(map(str, layers)), even / other - 1) if even >= (1 + LEAST_GAIN) * other else None


def ends_in_layers(settings: TrainSettings, work: Workload, gpu: Gpu) -> Ends:
    """What the ends of the model take for a micro-batch, attention of a layer at that sequence length included."""
    number = work.qwen.num_hidden_layers // (settings.pp * settings.vpp)
    plain, longer, first, last = (
        Chunk(number, False, False), Chunk(number + 1, False, False), Chunk(number, True, False),
        Chunk(number, False, True),
    )  # fmt: skip
    costs = chunk_costs(work, (plain, longer, first, last), gpu)
    took = {chunk: seconds(cost) for chunk, cost in costs.items()}
    layer = took[longer] - took[plain]
    layer += tensor_parallel_seconds(work, 1) + context_parallel_seconds(settings, work, 1)
    return Ends((took[first] - took[plain]) / layer, (took[last] - took[plain]) / layer)


def balanced_layers(num_layers: int, pp: int, vpp: int, ends: Ends) -> tuple[int, ...]:
    """Layers of each of the PP x VPP chunks, in the model's order: the slowest stage takes as little as possible.

    So does the slowest chunk of each stage: beside the output layer, the last chunk has fewer layers. Where equals
    differ by a layer, the later have more: they hold fewer micro-batches. num_layers is a multiple of PP x VPP. The
    installed Megatron-Core supports the split; if none is installed, every version does.
    """
    splits = [_free_split(num_layers, pp, vpp, ends), (num_layers // (pp * vpp),) * (pp * vpp)]
    if vpp == 1:
        splits.append(_split_with_equal_inner_stages(num_layers, pp, ends))
    return min((each for each in splits if supports(each, vpp)), key=lambda layers: _slowest_first(layers, pp, ends))


def _slowest_first(layers: Sequence[int], pp: int, ends: Ends) -> list[float]:
    """What each stage takes for a micro-batch, in units of a layer, from the slowest to the fastest."""
    stages = [float(sum(layers[stage::pp])) for stage in range(pp)]
    stages[0] += ends.first
    stages[-1] += ends.last
    return sorted(stages, reverse=True)


def _places(more: Sequence[float], least: int) -> Iterator[int]:
    """Where each next layer goes, among places that have `more` to do and `least` layers: to the fastest so far."""
    numbers = [least] * len(more)
    fastest = [(least + each, -at) for at, each in enumerate(more)]
    heapq.heapify(fastest)
    while True:
        at = -fastest[0][1]
        yield at
        numbers[at] += 1
        heapq.heapreplace(fastest, (numbers[at] + more[at], -at))


def _share(total: int, more: Sequence[float], least: int) -> list[int]:
    """`total` layers over places that have `more` to do: the slowest takes as little as possible, each has `least`."""
    if len(more) == 1:
        return [total]
    numbers = [least] * len(more)
    for at in itertools.islice(_places(more, least), total - least * len(more)):
        numbers[at] += 1
    return numbers


def _free_split(num_layers: int, pp: int, vpp: int, ends: Ends) -> tuple[int, ...]:
    more = [[0.0] * vpp for _ in range(pp)]  # of each stage's chunks
    more[0][0], more[-1][-1] = ends.first, ends.last
    stages = _share(num_layers, [sum(each) for each in more], vpp)
    chunks = [_share(number, each, 1) for number, each in zip(stages, more, strict=True)]
    return tuple(chunks[stage][index] for index in range(vpp) for stage in range(pp))


def _split_with_equal_inner_stages(num_layers: int, pp: int, ends: Ends) -> tuple[int, ...]:
    places = [*itertools.islice(_places([ends.first, ends.last], 1), num_layers - 2)]
    splits = []
    for number in range(1, (num_layers - 2) // (pp - 2) + 1) if pp > 2 else (0,):
        both = num_layers - (pp - 2) * number
        last = 1 + sum(places[: both - 2])
        splits.append((both - last, *[number] * (pp - 2), last))
    return min(splits, key=lambda layers: _slowest_first(layers, pp, ends))
