"""Training's samples: a dataset on disk as numbered rows of `seq_length` positions, the same for every layout.

Global sample g belongs to epoch g // samples_per_epoch. The order within an epoch depends on seed and epoch alone,
so more epochs change nothing that was. Labels are shifted here and nowhere else: the model is to give labels[i]
after tokens[0..i]. A document of n tokens fills n - 1 positions: its last token is only a label.
"""

from typing import Protocol

import numpy as np


class SampleDataset(Protocol):
    """Numbered samples: tokens and labels int64 [s], loss_mask float32 [s].

    `segment_ids` int32 [s] is there only when attention is to be kept within runs of equal numbers.
    weighted: whether loss_mask may hold other values than 0 and 1. order: how the epochs are ordered.
    """

    samples_per_epoch: int
    weighted: bool

    @property
    def order(self) -> str:
        """The name of the order: a position in the data means something in the same order alone."""
        ...

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        """The sample, whichever epoch it is of."""
        ...
