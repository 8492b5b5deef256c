"""PIPELINE_LAYERS of the shortest step: the last stage also computes the output layer and its loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.engine.pipeline_layers import supports
from common.estimate.gpus import Gpu, with_rates
from common.estimate.memory import work_of
from common.estimate.speed import chunk_cost, context_parallel_seconds, seconds, speed, tensor_parallel_seconds
from common.estimate.weights import Chunk
from common.model.shape.config import QwenConfig
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


def faster_split(settings: TrainSettings, qwen: QwenConfig, gpu: Gpu) -> Split | None:
    """The split with the shortest step; None at PP=1, and where even stages are as fast or within LEAST_GAIN of it.

    `settings` have even stages. Whether the split fits the memory is not asked.
    """
    if settings.pp == 1:
        return None
    rated = with_rates(gpu)
    ends = ends_in_layers(settings, qwen, rated)
    layers = balanced_layers(qwen.num_hidden_layers, settings.pp, settings.vpp, ends)
    text = ",".join(map(str, layers))
    even, other = (
        speed(each, gpu.platform, qwen, rated).step_seconds
        for each in (replace(settings, pipeline_layers=None), replace(settings, pipeline_layers=text))
    )
    return Split(text, even / other - 1) if even >= (1 + LEAST_GAIN) * other else None


def ends_in_layers(settings: TrainSettings, qwen: QwenConfig, gpu: Gpu) -> Ends:
    """What the ends of the model take for a micro-batch, attention of a layer at that sequence length included."""
    work = work_of(settings, gpu.platform, qwen)
    number = qwen.num_hidden_layers // (settings.pp * settings.vpp)

    def of_chunk(more: int = 0, *, first: bool = False, last: bool = False) -> float:
        return seconds(chunk_cost(work, Chunk(number + more, first, last), gpu))

    plain = of_chunk()
    layer = of_chunk(1) - plain + tensor_parallel_seconds(work, 1) + context_parallel_seconds(settings, work, 1)
    return Ends((of_chunk(first=True) - plain) / layer, (of_chunk(last=True) - plain) / layer)


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


def _share(total: int, more: Sequence[float], least: int) -> list[int]:
    """`total` layers over places that have `more` to do: the slowest takes as little as possible, each has `least`."""
    numbers = [least] * len(more)
    for _ in range(total - least * len(more)):
        place = min(range(len(more)), key=lambda at: (numbers[at] + more[at], -at))
        numbers[place] += 1
    return numbers


def _free_split(num_layers: int, pp: int, vpp: int, ends: Ends) -> tuple[int, ...]:
    more = [[0.0] * vpp for _ in range(pp)]  # of each stage's chunks
    more[0][0], more[-1][-1] = ends.first, ends.last
    stages = _share(num_layers, [sum(each) for each in more], vpp)
    chunks = [_share(number, each, 1) for number, each in zip(stages, more, strict=True)]
    return tuple(chunks[stage][index] for index in range(vpp) for stage in range(pp))


def _split_with_equal_inner_stages(num_layers: int, pp: int, ends: Ends) -> tuple[int, ...]:
    splits = []
    for number in range(1, (num_layers - 2) // (pp - 2) + 1) if pp > 2 else (0,):
        first, last = _share(num_layers - (pp - 2) * number, [ends.first, ends.last], 1)
        splits.append((first, *[number] * (pp - 2), last))
    return min(splits, key=lambda layers: _slowest_first(layers, pp, ends))
