"""Training's samples: a dataset on disk as numbered rows of `seq_length` positions, the same for every layout.

Global sample g belongs to epoch g // samples_per_epoch. The order within an epoch depends on seed and epoch alone,
so more epochs change nothing that was. Labels are shifted here and nowhere else: the model is to give labels[i]
after tokens[0..i]. A document of n tokens fills n - 1 positions: its last token is only a label.
"""

from typing import Any

import numpy as np

from common.data.dataset.indexed_dataset import IndexedDataset
from common.data.dataset.shuffle import (
    DocumentOrder,
    GroupedDocumentOrder,
    ListedDocumentOrder,
    ShuffleIndex,
    is_listed,
    keyed_shuffle,
    order_name,
)
from common.errors import KitError
from common.log import logger


class GPTDataset:
    """Documents in an order of their own each epoch, back to back, cut into windows that overlap by one token.

    A window of seq_length + 1 tokens is one sample; the tail that fills no window is left out. `listed`: whether the
    orders are listed in memory (shuffle.py); None: if they are few.
    """

    weighted = False

    def __init__(
        self,
        tokens: IndexedDataset,
        documents: range,
        seq_length: int,
        seed: int,
        reset_attention: bool,
        listed: bool | None = None,
    ) -> None:
        self.tokens, self.documents, self.seq_length, self.seed = tokens, documents, seq_length, seed
        self.reset_attention = reset_attention
        first, last = tokens.token_starts(np.array([documents.start, documents.stop])).tolist()
        total = last - first
        if total < seq_length + 1:
            raise KitError(
                f"{tokens.prefix}: the {len(documents)} documents of this split hold {total} tokens, a sample needs"
                f" SEQ_LENGTH + 1 = {seq_length + 1}: use more data, another SPLIT or a smaller SEQ_LENGTH"
            )
        self.samples_per_epoch = (total - 1) // seq_length
        few = is_listed(len(documents), self.samples_per_epoch)
        self.listed = few if listed is None else listed
        if self.listed and not few:
            logger.info(
                "%s: its order takes %d MiB in each process, as the run began; one that begins now needs none",
                tokens.prefix.name, (16 * len(documents) + 8 * self.samples_per_epoch) >> 20,
            )  # fmt: skip
        logger.info(
            "%s: %d tokens make %d samples an epoch, %d at its end are left out",
            tokens.prefix.name, total, self.samples_per_epoch, total - 1 - self.samples_per_epoch * seq_length,
        )  # fmt: skip
        self._epoch = -1

    @property
    def order(self) -> str:
        """How the epochs are ordered; the same position is another sample in another order."""
        return order_name(self.listed)

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(global_index, self.samples_per_epoch)
        self._order(epoch)
        start = int(self._windows[index]) * self.seq_length
        window, segments = self._read(start)
        sample = {
            "tokens": window[:-1],
            "labels": window[1:],
            "loss_mask": np.ones(self.seq_length, np.float32),
        }
        if self.reset_attention:
            sample["segment_ids"] = segments[:-1]
        return sample

    def _order(self, epoch: int) -> None:
        """Sets the order of documents and windows of `epoch`; the last one asked for is kept."""
        if epoch == self._epoch:
            return
        if self.listed:
            random = np.random.default_rng([self.seed, epoch])
            self._documents: DocumentOrder = ListedDocumentOrder(self.tokens, self.documents, random)
            self._windows: ShuffleIndex = random.permutation(self.samples_per_epoch)
        else:
            self._documents = GroupedDocumentOrder(self.tokens, self.documents, self.seed, epoch)
            self._windows = keyed_shuffle(self.samples_per_epoch, self.seed, epoch)
        self._epoch = epoch

    def _read(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64, number of the document within the window int32), [seq_length + 1] each, from `start` on."""
        size = self.seq_length + 1
        window, segments = np.empty(size, np.int64), np.empty(size, np.int32)
        filled = segment = 0
        for document, offset in self._documents.parts(start):
            part = self.tokens.get(document, offset, size - filled)
            window[filled : filled + part.size] = part
            segments[filled : filled + part.size] = segment
            filled, segment = filled + part.size, segment + (part.size > 0)
            if filled == size:
                break
        return window, segments

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": -1, "_documents": None, "_windows": None}
