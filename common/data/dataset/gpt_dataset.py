"""Megatron's GPTDataset: shuffled documents, concatenated and cut into samples of `seq_length` tokens."""

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
    """Documents in a new order each epoch, concatenated and cut into windows that overlap by one token.

    As Megatron-Core's GPTDataset, a window of seq_length + 1 tokens is one sample, and the incomplete last one is
    dropped. Its document, sample and shuffle indices, which grow with the data, are replaced by those of shuffle.py.
    listed: whether the order is listed in memory; None: if it is short.
    """

    weighted, filled, documents_per_sample = False, 1.0, 1.0

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
        short = is_listed(len(documents), self.samples_per_epoch)
        self.listed = short if listed is None else listed
        self.order = order_name(self.listed)
        if self.listed and not short:
            logger.info(
                "%s: its shuffle index takes %d MiB in each reader, as when the run began; a new run needs none",
                tokens.prefix.name, (16 * len(documents) + 8 * self.samples_per_epoch) >> 20,
            )  # fmt: skip
        logger.info(
            "%s: %d tokens make %d samples per epoch, dropping the last %d tokens",
            tokens.prefix.name, total, self.samples_per_epoch, total - 1 - self.samples_per_epoch * seq_length,
        )  # fmt: skip
        self._epoch = -1

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(global_index, self.samples_per_epoch)
        self._set_epoch(epoch)
        window, segments = self._read(int(self._shuffle_index[index]) * self.seq_length)
        sample = {
            "tokens": window[:-1],
            "labels": window[1:],
            "loss_mask": np.ones(self.seq_length, np.float32),
        }
        if self.reset_attention:
            sample["segment_ids"] = segments[:-1]
        return sample

    def _set_epoch(self, epoch: int) -> None:
        """Builds the order of documents and windows of `epoch`; that of the last epoch is kept."""
        if epoch == self._epoch:
            return
        if self.listed:
            random = np.random.default_rng([self.seed, epoch])
            self._document_order: DocumentOrder = ListedDocumentOrder(self.tokens, self.documents, random)
            self._shuffle_index: ShuffleIndex = random.permutation(self.samples_per_epoch)
        else:
            self._document_order = GroupedDocumentOrder(self.tokens, self.documents, self.seed, epoch)
            self._shuffle_index = keyed_shuffle(self.samples_per_epoch, self.seed, epoch)
        self._epoch = epoch

    def _read(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64, index of the document in the window int32), [seq_length + 1] each, from token `start` on."""
        size = self.seq_length + 1
        window, segments = np.empty(size, np.int64), np.empty(size, np.int32)
        filled = segment = 0
        for document, offset in self._document_order.parts(start):
            part = self.tokens.get(document, offset, size - filled)
            window[filled : filled + part.size] = part
            segments[filled : filled + part.size] = segment
            filled, segment = filled + part.size, segment + (part.size > 0)
            if filled == size:
                break
        return window, segments

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": -1, "_document_order": None, "_shuffle_index": None}
