"""Conversations as samples: one a row of `seq_length` positions, or several packed into one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.dataset.indexed_dataset import IndexedDataset
from common.data.dataset.packing import pack
from common.data.dataset.shuffle import ShuffleIndex, is_listed, keyed_shuffle, order_name
from common.errors import KitError
from common.log import logger

TRUNCATE = ("error", "drop", "left", "right")


@dataclass(frozen=True)
class SampleIndex:
    """The documents from `first` on that are samples, and how a long one is cut to `limit` tokens.

    gaps: for each document that is left out, in order, how many samples come before it. keep_end: a cut leaves out the
    beginning. num_tokens: of all samples together. Memory grows with what is left out alone.
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
    """What is counted while documents are fitted."""

    over: int = 0
    longest: int = 0
    unlearned: int = 0
    short: int = 0


def build_sample_index(
    tokens: IndexedDataset, mask: IndexedDataset, documents: range, seq_length: int, truncate: str
) -> SampleIndex:
    """The samples that `documents` make, too long ones treated by `truncate`; raises KitError where none is left."""
    if truncate not in TRUNCATE:
        raise KitError(f"TRUNCATE={truncate} is not known: set it to one of {', '.join(TRUNCATE)}")
    limit, told, num_tokens = seq_length + 1, _Counts(), 0
    left_out = [np.empty(0, np.int64)]
    for first, lengths in tokens.length_blocks(documents.start, documents.stop):
        use = _usable(mask, first, lengths, limit, truncate, told)
        left_out.append(np.flatnonzero(~use) + (first - documents.start))
        num_tokens += int(np.minimum(lengths, limit)[use].sum())
    without = np.concatenate(left_out)
    if told.over:
        _report_too_long(tokens.prefix, len(documents), told, seq_length, truncate)
    if told.unlearned:
        logger.info("%s: %d samples have nothing to learn after the cut: dropped", tokens.prefix.name, told.unlearned)
    if told.short:
        logger.info("%s: %d samples of fewer than two tokens: dropped", tokens.prefix.name, told.short)
    if without.size == len(documents):
        raise KitError(f"{tokens.prefix}: none of the {len(documents)} samples of this split can be used")
    number, gaps = len(documents) - without.size, without - np.arange(without.size)
    return SampleIndex(tokens, documents.start, number, gaps, limit, truncate == "left", num_tokens)


def _usable(
    mask: IndexedDataset, first: int, lengths: np.ndarray, limit: int, truncate: str, told: _Counts
) -> np.ndarray:
    """bool: whether each of the documents from `first` on is a sample."""
    over = lengths > limit
    told.over += int(over.sum())
    told.longest = max(told.longest, int(lengths.max()))
    use = ~over if truncate == "drop" else np.ones_like(over)
    if truncate in ("left", "right"):
        for i in np.flatnonzero(over).tolist():
            start = int(lengths[i]) - limit if truncate == "left" else 0
            use[i] = mask.get(first + i, start + 1, limit - 1).any()  # the first token is no label
        told.unlearned += int((~use).sum())
    short = use & (lengths < 2)
    told.short += int(short.sum())
    return use & ~short


def _report_too_long(prefix: Path, number: int, told: _Counts, seq_length: int, truncate: str) -> None:
    text = (
        f"{told.over} of {number} samples have more than SEQ_LENGTH + 1 = {seq_length + 1} tokens,"
        f" the longest {told.longest}"
    )
    if truncate == "error":
        raise KitError(f"{prefix}: {text}: set TRUNCATE=drop, left or right, or a larger SEQ_LENGTH")
    done = {"drop": "dropped", "left": "cut, their end is kept", "right": "cut, their beginning is kept"}[truncate]
    logger.info("%s: %s: %s", prefix.name, text, done)


class SFTDataset:
    """Conversations: one a row, or with `packing` several, each a segment of its own; the rest of a row is padding."""

    def __init__(
        self,
        fitted: SampleIndex,
        mask: IndexedDataset,
        seed: int,
        packing: bool,
        pad_id: int,
        listed: bool | None = None,
    ) -> None:
        self.tokens, self.mask, self.fitted, self.seq_length = fitted.tokens, mask, fitted, fitted.limit - 1
        self.seed, self.packing, self.pad_id = seed, packing, pad_id
        self.samples_per_epoch = fitted.num_samples
        if packing:
            members, self._starts = pack(fitted.sizes() - 1, self.seq_length)
            self._members = members.astype(np.min_scalar_type(max(0, fitted.num_samples - 1)))
            self.samples_per_epoch = self._starts.size - 1
        self.weighted = mask.dtype.kind == "f"
        self.listed = is_listed(self.samples_per_epoch) if listed is None else listed
        used = fitted.num_tokens - fitted.num_samples
        logger.info(
            "%s: %d samples in %d rows of %d, %.1f%% full",
            self.tokens.prefix.name, fitted.num_samples, self.samples_per_epoch, self.seq_length,
            100 * used / (self.samples_per_epoch * self.seq_length),
        )  # fmt: skip
        self._epoch = -1

    @property
    def order(self) -> str:
        """How the epochs are ordered; the same position is another sample in another order."""
        return order_name(self.listed)

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(global_index, self.samples_per_epoch)
        self._set_order(epoch)
        members = self._members_of(int(self._order[index]))
        sample: dict[str, np.ndarray] = {
            "tokens": np.full(self.seq_length, self.pad_id, np.int64),
            "labels": np.full(self.seq_length, self.pad_id, np.int64),
            "loss_mask": np.zeros(self.seq_length, np.float32),
        }
        segments = np.full(self.seq_length, len(members), np.int32)
        at = 0
        for segment, member in enumerate(members):
            document, start, size = self.fitted.part(member)
            end = at + size - 1
            ids = self.tokens.get(document, start, size)
            sample["tokens"][at:end], sample["labels"][at:end] = ids[:-1], ids[1:]
            sample["loss_mask"][at:end] = self.mask.get(document, start + 1, size - 1)
            segments[at:end] = segment
            at = end
        if self.packing:
            sample["segment_ids"] = segments
        return sample

    def _set_order(self, epoch: int) -> None:
        """Sets the order of the rows of `epoch`; the last one asked for is kept."""
        if epoch != self._epoch:
            number = self.samples_per_epoch
            random = [self.seed, epoch]
            self._order: ShuffleIndex = (
                np.random.default_rng(random).permutation(number) if self.listed else keyed_shuffle(number, *random)
            )
            self._epoch = epoch

    def _members_of(self, row: int) -> list[int]:
        """The samples that stand in `row`."""
        if not self.packing:
            return [row]
        members: list[int] = self._members[self._starts[row] : self._starts[row + 1]].tolist()
        return members
