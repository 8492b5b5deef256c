"""The mean of a run's newest checkpoints (LAWA, arXiv 2209.14981; "checkpoint averaging" of the Transformer paper)."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from common.checkpoint.formats.checkpoint_paths import Checkpoint, iteration_dir, list_iterations, require_checkpoint
from common.checkpoint.io.lazy_tensor import Columns, LazyTensor
from common.errors import KitError


def checkpoints_to_average(checkpoint: Checkpoint, number: int) -> list[Checkpoint]:
    """`checkpoint` and the `number` - 1 complete ones before it, oldest first; raises KitError if there are fewer."""
    if number < 1:
        raise KitError(f"AVERAGE={number}: it must be at least 1")
    if number == 1:
        return [checkpoint]
    iterations = list_iterations(checkpoint.folder)
    if checkpoint.iteration in iterations:
        iterations = iterations[: iterations.index(checkpoint.iteration) + 1][-number:]
    if checkpoint.iteration not in iterations or len(iterations) < number:
        names = ", ".join(iteration_dir(checkpoint.folder, each).name for each in iterations) or "none"
        raise KitError(
            f"AVERAGE={number}: {checkpoint.folder} has fewer checkpoints of a run up to {checkpoint.path.name}"
            f" ({names}): set AVERAGE to their number, or keep more while training (KEEP_CHECKPOINTS, KEEP_EVERY)"
        )
    return [require_checkpoint(iteration_dir(checkpoint.folder, each)) for each in iterations]


def mean_state_dict(state_dicts: Sequence[dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """The mean of each tensor, of the first's dtype: summed in float32 in the given order, divided, and rounded once.

    A tensor takes its size in float32 in memory while it is written, and twice that of one of `state_dicts`.
    """
    if len(state_dicts) == 1:
        return state_dicts[0]
    return {
        name: LazyTensor(first.shape, first.dtype, partial(_mean, [each[name] for each in state_dicts]), name)
        for name, first in state_dicts[0].items()
    }


def _mean(tensors: Sequence[LazyTensor]) -> Iterator[Columns]:
    total = tensors[0].materialize().to(torch.float32)
    for tensor in tensors[1:]:
        total += tensor.materialize()
    yield [total.div_(len(tensors))]
