"""Megatron's SFTDataset: conversations as samples, one per row of `seq_length` positions or several packed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.dataset.indexed_dataset import IndexedDataset
from common.data.dataset.packing import pack
from common.data.dataset.shuffle import epoch_order, is_listed, order_name
from common.errors import KitError
from common.log import logger

TRUNCATE = ("error", "drop", "left", "right")


@dataclass(frozen=True)
class SampleIndex:
    """Which documents from `first` on are samples, and how long ones are truncated to `limit` tokens.

    gaps: for each dropped document, in order, the number of samples before it. keep_end: truncation removes the
    beginning. num_tokens: of all samples. Memory only grows with the number of dropped documents.
    """

    tokens: IndexedDataset
    first: int
    num_samples: int
    gaps: np.ndarray
    limit: int
    keep_end: bool
    num_tokens: int

    def part(self, sample: int) -> tuple[int, int, int]:
        """(document, first token, number of tokens) of a sample."""
        document = self.first + sample + int(np.searchsorted(self.gaps, sample, side="right"))
        length = self.tokens.length(document)
        kept = min(length, self.limit)
        return document, length - kept if self.keep_end else 0, kept

    def sizes(self) -> np.ndarray:
        """int32 [samples]: tokens of each."""
        used = np.ones(self.num_samples + self.gaps.size, bool)
        used[self.gaps + np.arange(self.gaps.size)] = False
        sizes, at = np.empty(self.num_samples, np.int32), 0
        for first, lengths in self.tokens.length_blocks(self.first, self.first + used.size):
            start = first - self.first
            kept = np.minimum(lengths, self.limit)[used[start : start + lengths.size]]
            sizes[at : at + kept.size] = kept
            at += kept.size
        return sizes


@dataclass
class _Counts:
    """What `build_sample_index` logs."""

    over: int = 0
    longest: int = 0
    untrained: int = 0
    short: int = 0


def build_sample_index(
    tokens: IndexedDataset, mask: IndexedDataset, documents: range, seq_length: int, truncate: str
) -> SampleIndex:
    """The samples in `documents`, with long ones handled by `truncate`; raises KitError when no sample is left."""
    if truncate not in TRUNCATE:
        raise KitError(f"TRUNCATE={truncate} is unknown: set it to one of {', '.join(TRUNCATE)}")
    limit, counts, num_tokens = seq_length + 1, _Counts(), 0
    dropped = [np.empty(0, np.int64)]
    for first, lengths in tokens.length_blocks(documents.start, documents.stop):
        use = _usable(mask, first, lengths, limit, truncate, counts)
        dropped.append(np.flatnonzero(~use) + (first - documents.start))
        num_tokens += int(np.minimum(lengths, limit)[use].sum())
    without = np.concatenate(dropped)
    if counts.over:
        _report_too_long(tokens.prefix, len(documents), counts, seq_length, truncate)
    if counts.untrained:
        text = "%s: dropped %d samples that have nothing to train on after truncation"
        logger.info(text, tokens.prefix.name, counts.untrained)
    if counts.short:
        logger.info("%s: dropped %d samples of fewer than two tokens", tokens.prefix.name, counts.short)
    if without.size == len(documents):
        raise KitError(f"{tokens.prefix}: none of the {len(documents)} samples of this split can be used")
    number, gaps = len(documents) - without.size, without - np.arange(without.size)
    return SampleIndex(tokens, documents.start, number, gaps, limit, truncate == "left", num_tokens)


def _usable(
    mask: IndexedDataset, first: int, lengths: np.ndarray, limit: int, truncate: str, counts: _Counts
) -> np.ndarray:
    """bool: whether each of the documents from `first` on is a sample."""
    over = lengths > limit
    counts.over += int(over.sum())
    counts.longest = max(counts.longest, int(lengths.max()))
    use = ~over if truncate == "drop" else np.ones_like(over)
    if truncate in ("left", "right"):
        for i in np.flatnonzero(over).tolist():
            start = int(lengths[i]) - limit if truncate == "left" else 0
            use[i] = mask.get(first + i, start + 1, limit - 1).any()  # the first token is not a label
        counts.untrained += int((~use).sum())
    short = use & (lengths < 2)
    counts.short += int(short.sum())
    return use & ~short


def _report_too_long(prefix: Path, number: int, counts: _Counts, seq_length: int, truncate: str) -> None:
    text = (
        f"{counts.over} of {number} samples have more than SEQ_LENGTH + 1 = {seq_length + 1} tokens,"
        f" the longest {counts.longest}"
    )
    if truncate == "error":
        raise KitError(f"{prefix}: {text}: set TRUNCATE=drop, left or right, or a larger SEQ_LENGTH")
    done = {"drop": "dropped", "left": "truncated from the left", "right": "truncated from the right"}[truncate]
    logger.info("%s: %s: %s", prefix.name, text, done)


class SFTDataset:
    """Conversations: one per row, or with `packing` several, each its own segment; the rest of a row is padding."""

    def __init__(
        self,
        sample_index: SampleIndex,
        mask: IndexedDataset,
        seed: int,
        packing: bool,
        pad_id: int,
        listed: bool | None = None,
    ) -> None:
        self.tokens, self.mask, self.sample_index, self.seq_length = (
            sample_index.tokens,
            mask,
            sample_index,
            sample_index.limit - 1,
        )
        self.seed, self.packing, self.pad_id = seed, packing, pad_id
        self.samples_per_epoch = sample_index.num_samples
        if packing:
            members, self._row_starts = pack(sample_index.sizes() - 1, self.seq_length)
            self._members = members.astype(np.min_scalar_type(max(0, sample_index.num_samples - 1)))
            self.samples_per_epoch = self._row_starts.size - 1
        self.weighted = mask.dtype.kind == "f"
        self.listed = is_listed(self.samples_per_epoch) if listed is None else listed
        self.order = order_name(self.listed)
        used = sample_index.num_tokens - sample_index.num_samples
        self.filled = used / (self.samples_per_epoch * self.seq_length)
        self.documents_per_sample = sample_index.num_samples / self.samples_per_epoch
        logger.info(
            "%s: %d samples in %d rows of %d tokens, %.1f%% full",
            self.tokens.prefix.name, sample_index.num_samples, self.samples_per_epoch, self.seq_length,
            100 * self.filled,
        )  # fmt: skip
        self._epoch = -1

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(global_index, self.samples_per_epoch)
        self._set_epoch(epoch)
        members = self._members_of(int(self._shuffle_index[index]))
        sample: dict[str, np.ndarray] = {
            "tokens": np.full(self.seq_length, self.pad_id, np.int64),
            "labels": np.full(self.seq_length, self.pad_id, np.int64),
            "loss_mask": np.zeros(self.seq_length, np.float32),
        }
        segments = np.full(self.seq_length, len(members), np.int32)
        at = 0
        for segment, member in enumerate(members):
            document, start, size = self.sample_index.part(member)
            end = at + size - 1
            ids = self.tokens.get(document, start, size)
            sample["tokens"][at:end], sample["labels"][at:end] = ids[:-1], ids[1:]
            sample["loss_mask"][at:end] = self.mask.get(document, start + 1, size - 1)
            segments[at:end] = segment
            at = end
        sample["num_padding"] = np.array(self.seq_length - at)
        if self.packing:
            sample["segment_ids"] = segments
        return sample

    def _set_epoch(self, epoch: int) -> None:
        """Builds the order of the rows of `epoch`; that of the last epoch is kept."""
        if epoch != self._epoch:
            self._shuffle_index = epoch_order(self.samples_per_epoch, self.seed, epoch, listed=self.listed)
            self._epoch = epoch

    def _members_of(self, row: int) -> list[int]:
        """The samples packed into `row`."""
        if not self.packing:
            return [row]
        members: list[int] = self._members[self._row_starts[row] : self._row_starts[row + 1]].tolist()
        return members
