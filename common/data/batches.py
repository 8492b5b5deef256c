"""Samples to the micro-batches of one data-parallel rank, in an order that is the same for every layout.

Global batch k holds global samples [k x gbs, (k + 1) x gbs); its micro-batch m on rank r holds the samples from
m x mbs x dp + r x mbs on.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.data.samples import Samples


def batches(
    samples: Samples,
    *,
    start_sample: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches of rank `dp_rank` from global sample `start_sample` on; each tensor is [b, s].

    `num_workers` processes read ahead; with 0 the caller's own process reads.
    """
    assert global_batch_size % (micro_batch_size * dp_size) == 0
    indices = micro_batch_indices(start_sample, global_batch_size, micro_batch_size, dp_rank, dp_size)
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        samples,  # type: ignore[arg-type]  # has __getitem__, which is all that a batch sampler needs
        batch_sampler=indices,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
    return iter(loader)


def micro_batch_indices(
    start_sample: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[list[int]]:
    """Endless lists of the global sample numbers of rank `dp_rank`'s micro-batches."""
    first = start_sample + dp_rank * micro_batch_size
    while True:
        for start in range(first, first + global_batch_size, micro_batch_size * dp_size):
            yield list(range(start, start + micro_batch_size))
        first += global_batch_size


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The rows' arrays [s] stacked to tensors [b, s]."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
