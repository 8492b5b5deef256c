"""Samples to the micro-batches of one data-parallel rank, in an order that is the same for every parallel layout.

Global batch k holds global samples [k x gbs, (k + 1) x gbs). Its micro-batch m on rank r starts at sample
m x mbs x dp + r x mbs, as in Megatron's MegatronPretrainingSampler.
"""

from collections.abc import Collection, Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.data.dataset.sample_dataset import SampleDataset

Batch = dict[str, torch.Tensor]


class MicroBatchLoader:
    """Endless micro-batches of rank `dp_rank` from a global sample on; each tensor is [b, s].

    fields: the entries of samples that micro-batches have; None: all.
    `num_workers` processes read ahead; with 0 the calling process reads. They are forked in the constructor and stay:
    created before CUDA is initialized, they hold no GPU resources, however their parent ends.
    """

    def __init__(
        self,
        samples: SampleDataset,
        *,
        start_sample: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int = 0,
        fields: Collection[str] | None = None,
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0
        self.samples = samples
        self._sampler = _MicroBatchSampler(start_sample, global_batch_size, micro_batch_size, dp_rank, dp_size)
        self._loader: DataLoader[Batch] = DataLoader(
            samples,  # type: ignore[arg-type]  # has __getitem__, all that a batch sampler needs
            batch_sampler=self._sampler,
            collate_fn=partial(collate, fields=fields),
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
            persistent_workers=num_workers > 0,
        )
        self._first: Iterator[Batch] | None = iter(self._loader)  # starts the workers

    def read_from(self, start_sample: int) -> Iterator[Batch]:
        """The micro-batches from `start_sample` on; ends the previous iterator."""
        reads, self._first = self._first, None
        if reads is None or start_sample != self._sampler.start_sample:
            self._sampler.start_sample = start_sample
            reads = iter(self._loader)
        return reads


class _MicroBatchSampler:
    """A batch sampler whose start can be set before each iteration."""

    def __init__(self, start_sample: int, *sizes: int) -> None:
        self.start_sample, self.sizes = start_sample, sizes

    def __iter__(self) -> Iterator[list[int]]:
        return micro_batch_indices(self.start_sample, *self.sizes)


def micro_batch_indices(
    start_sample: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[list[int]]:
    """Endless lists of global sample indices, one for each micro-batch of rank `dp_rank`."""
    first = start_sample + dp_rank * micro_batch_size
    while True:
        for start in range(first, first + global_batch_size, micro_batch_size * dp_size):
            yield list(range(start, start + micro_batch_size))
        first += global_batch_size


def collate(rows: list[dict[str, np.ndarray]], fields: Collection[str] | None = None) -> Batch:
    """The samples' arrays [s] stacked to tensors [b, s]; of entries outside `fields`, unless it is None, nothing."""
    names = [name for name in rows[0] if fields is None or name in fields]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
