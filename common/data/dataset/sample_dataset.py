"""The interface of training datasets: samples of `seq_length` positions by index, independent of the parallel layout.

Global sample g belongs to epoch g // samples_per_epoch. The order within an epoch depends only on the seed and the
epoch, so more epochs do not change earlier ones. The datasets shift the labels, and nothing else does: the model
predicts labels[i] from tokens[0..i]. A document of n tokens fills n - 1 positions; its last token is only a label.
"""

from typing import Protocol

import numpy as np


class SampleDataset(Protocol):
    """Samples by index: tokens and labels int64 [s], loss_mask float32 [s].

    `segment_ids` int32 [s] is present when attention must stay within runs of equal values; `num_padding` int64 [], the
    number of positions at the end that hold no token, where there may be any. Preferences have `pairs` too, and s may
    be that of two rows, see preference_dataset.py.
    weighted: whether loss_mask may hold values other than 0 and 1.
    order: the name of the shuffle, see shuffle.py; a checkpoint's position is only valid with the same one.
    """

    samples_per_epoch: int
    weighted: bool
    order: str

    @property
    def filled(self) -> float:
        """The share of an epoch's positions that hold a token; the rest is padding."""
        ...

    @property
    def documents_per_sample(self) -> float:
        """How many conversations a sample holds on average; 1 for pre-training, where they are not counted."""
        ...

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        """The sample at a global index, in whichever epoch it lies."""
        ...
