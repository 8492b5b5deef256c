"""Training's samples: a dataset on disk as numbered rows of `seq_length` positions, the same for every layout.

Global sample g belongs to epoch g // samples_per_epoch. The order within an epoch depends on seed and epoch alone,
so more epochs change nothing that was. Labels are shifted here and nowhere else: the model is to give labels[i]
after tokens[0..i]. A document of n tokens fills n - 1 positions: its last token is only a label.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.data.indexed import IndexedReader
from common.data.manifest import DataFiles
from common.data.packing import pack
from common.errors import KitError
from common.log import logger

KIND_OF_MODE = {"pretrain": "pretrain", "finetune": "sft"}
TRUNCATE = ("error", "drop", "left", "right")


class Samples(Protocol):
    """Numbered samples: tokens and labels int64 [s], loss_mask float32 [s].

    `segment_ids` int32 [s] is there only when attention is to be kept within runs of equal numbers.
    weighted: whether loss_mask may hold other values than 0 and 1.
    """

    samples_per_epoch: int
    weighted: bool

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        """The sample, whichever epoch it is of."""
        ...


def split_documents(num_documents: int, split: str) -> tuple[range, range]:
    """(training's documents, validation's), contiguous, by shares such as "98,2,0"; the third share is for nothing.

    The bounds are rounded as Megatron-Core's blended_megatron_dataset_builder does. Raises KitError.
    """
    rule = f"SPLIT={split}: give one to three numbers that are not negative, as 98,2,0"
    try:
        shares = [float(word) for word in split.split(",")]
    except ValueError as error:
        raise KitError(rule) from error
    if len(shares) > 3 or not all(0 <= share < float("inf") for share in shares) or shares[0] <= 0:
        raise KitError(f"{rule}, the first above 0")
    ends = np.cumsum(shares) / sum(shares)
    train = round(float(ends[0]) * num_documents)
    valid = round(float(ends[min(1, len(shares) - 1)]) * num_documents)
    return range(train), range(train, valid)


def open_samples(
    files: DataFiles,
    *,
    train_mode: str,
    seq_length: int,
    seed: int,
    documents: range | None = None,
    packing: bool = False,
    truncate: str = "error",
    reset_attention: bool = False,
    pad_id: int = 0,
) -> Samples:
    """The samples of `documents` (None: all); raises KitError for data of the other kind, or too little of it."""
    if files.kind != KIND_OF_MODE[train_mode]:
        raise KitError(
            f'{files.tokens} is "{files.kind}" data, but TRAIN_MODE={train_mode} learns "{KIND_OF_MODE[train_mode]}"'
            " data: change TRAIN_MODE, or DATASET_PATH"
        )
    if seed < 0:
        raise KitError(f"SEED={seed}: it must not be negative")
    tokens = IndexedReader(files.tokens)
    chosen = documents if documents is not None else range(len(tokens))
    if train_mode == "pretrain":
        return PretrainSamples(tokens, chosen, seq_length, seed, reset_attention)
    assert files.loss_mask
    mask = IndexedReader(files.loss_mask)
    if not np.array_equal(mask.lengths, tokens.lengths):
        raise KitError(f"{files.loss_mask} does not fit {files.tokens}: write the data again with step 1")
    rows = _fit(tokens, mask, chosen, seq_length, truncate)
    return SftSamples(tokens, mask, rows, seq_length, seed, packing, pad_id)


class PretrainSamples:
    """Documents in an order of their own each epoch, back to back, cut into windows that overlap by one token.

    A window of seq_length + 1 tokens is one sample; the tail that fills no window is left out.
    """

    def __init__(
        self, tokens: IndexedReader, documents: range, seq_length: int, seed: int, reset_attention: bool
    ) -> None:
        self.tokens, self.documents, self.seq_length, self.seed = tokens, documents, seq_length, seed
        self.reset_attention = reset_attention
        lengths = tokens.lengths[documents.start : documents.stop]
        total = int(lengths.sum(dtype=np.int64))
        if total < seq_length + 1:
            raise KitError(
                f"{tokens.prefix}: the {len(documents)} documents of this split hold {total} tokens, a sample needs"
                f" SEQ_LENGTH + 1 = {seq_length + 1}: use more data, another SPLIT or a smaller SEQ_LENGTH"
            )
        self.samples_per_epoch = (total - 1) // seq_length
        self.weighted = False
        logger.info(
            "%s: %d tokens make %d samples an epoch, %d at its end are left out",
            tokens.prefix.name, total, self.samples_per_epoch, total - 1 - self.samples_per_epoch * seq_length,
        )  # fmt: skip
        self._epoch = -1

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
        random = np.random.default_rng([self.seed, epoch])
        self._documents = random.permutation(len(self.documents)) + self.documents.start
        lengths = self.tokens.lengths[self._documents]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._windows = random.permutation(self.samples_per_epoch)
        self._epoch = epoch

    def _read(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64, number of the document within the window int32), [seq_length + 1] each, from `start` on."""
        size = self.seq_length + 1
        window, segments = np.empty(size, np.int64), np.empty(size, np.int32)
        at = int(np.searchsorted(self._ends, start, side="right"))
        offset = start - (int(self._ends[at - 1]) if at else 0)
        filled = segment = 0
        while filled < size:
            part = self.tokens.get(int(self._documents[at]), offset, size - filled)
            window[filled : filled + part.size] = part
            segments[filled : filled + part.size] = segment
            filled, at, offset, segment = filled + part.size, at + 1, 0, segment + (part.size > 0)
        return window, segments

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": -1, "_documents": None, "_ends": None, "_windows": None}


def _fit(tokens: IndexedReader, mask: IndexedReader, documents: range, seq_length: int, truncate: str) -> np.ndarray:
    """int64 [samples, 3]: document, first token and number of tokens of each sample; too long ones by `truncate`."""
    if truncate not in TRUNCATE:
        raise KitError(f"TRUNCATE={truncate} is not known: set it to one of {', '.join(TRUNCATE)}")
    numbers = np.arange(documents.start, documents.stop, dtype=np.int64)
    lengths = tokens.lengths[documents.start : documents.stop].astype(np.int64)
    limit = seq_length + 1
    over = lengths > limit
    if over.any():
        _tell_too_long(tokens.prefix, lengths, over, seq_length, truncate)
    kept = np.minimum(lengths, limit)
    starts = np.where(over, lengths - kept, 0) if truncate == "left" else np.zeros_like(lengths)
    use = ~over if truncate == "drop" else np.ones_like(over)
    if truncate in ("left", "right"):
        for i in np.flatnonzero(over):
            # The first token is no label.
            use[i] = mask.get(int(numbers[i]), int(starts[i]) + 1, limit - 1).any()
        if not use.all():
            logger.info("%s: %d samples have nothing to learn after the cut: dropped", tokens.prefix.name, (~use).sum())
    if (empty := int((use & (lengths < 2)).sum())) > 0:
        logger.info("%s: %d samples of fewer than two tokens: dropped", tokens.prefix.name, empty)
    use &= lengths > 1
    if not use.any():
        raise KitError(f"{tokens.prefix}: none of the {len(documents)} samples of this split can be used")
    return np.stack([numbers, starts, kept], axis=1)[use]


def _tell_too_long(prefix: Path, lengths: np.ndarray, over: np.ndarray, seq_length: int, truncate: str) -> None:
    told = (
        f"{int(over.sum())} of {lengths.size} samples have more than SEQ_LENGTH + 1 = {seq_length + 1} tokens,"
        f" the longest {int(lengths.max())}"
    )
    if truncate == "error":
        raise KitError(f"{prefix}: {told}: set TRUNCATE=drop, left or right, or a larger SEQ_LENGTH")
    done = {"drop": "dropped", "left": "cut, their end is kept", "right": "cut, their beginning is kept"}[truncate]
    logger.info("%s: %s: %s", prefix.name, told, done)


class SftSamples:
    """Conversations: one a row, or with `packing` several, each a segment of its own; the rest of a row is padding."""

    def __init__(
        self,
        tokens: IndexedReader,
        mask: IndexedReader,
        parts: np.ndarray,
        seq_length: int,
        seed: int,
        packing: bool,
        pad_id: int,
    ) -> None:
        self.tokens, self.mask, self.parts, self.seq_length = tokens, mask, parts, seq_length
        self.seed, self.packing, self.pad_id = seed, packing, pad_id
        self._members, self._starts = np.arange(len(parts)), np.arange(len(parts) + 1)
        if packing:
            self._members, self._starts = pack(parts[:, 2] - 1, seq_length)
        self.samples_per_epoch = self._starts.size - 1
        self.weighted = mask.dtype.kind == "f"
        used = int((parts[:, 2] - 1).sum())
        logger.info(
            "%s: %d samples in %d rows of %d, %.1f%% full",
            tokens.prefix.name, len(parts), self.samples_per_epoch, seq_length,
            100 * used / (self.samples_per_epoch * seq_length),
        )  # fmt: skip
        self._epoch = -1

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(global_index, self.samples_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.samples_per_epoch)
            self._epoch = epoch
        row = int(self._order[index])
        members = self._members[self._starts[row] : self._starts[row + 1]]
        sample: dict[str, np.ndarray] = {
            "tokens": np.full(self.seq_length, self.pad_id, np.int64),
            "labels": np.full(self.seq_length, self.pad_id, np.int64),
            "loss_mask": np.zeros(self.seq_length, np.float32),
        }
        segments = np.full(self.seq_length, len(members), np.int32)
        at = 0
        for segment, member in enumerate(members):
            document, start, size = self.parts[member].tolist()
            end = at + size - 1
            ids = self.tokens.get(document, start, size)
            sample["tokens"][at:end], sample["labels"][at:end] = ids[:-1], ids[1:]
            sample["loss_mask"][at:end] = self.mask.get(document, start + 1, size - 1)
            segments[at:end] = segment
            at = end
        if self.packing:
            sample["segment_ids"] = segments
        return sample
