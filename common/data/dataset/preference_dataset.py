"""Pairs of a chosen and a rejected answer as samples: documents 2 n and 2 n + 1 of a dataset are those of pair n.

    PACKING=false   a sample is two rows of `seq_length` positions, one after the other:   chosen .... | rejected ....
    PACKING=true    a sample is one row of several pairs, each answer its own segment:     c0 r0 c1 r1 c2 r2 ........

So a pair is never split over samples, and without packing attention needs no mask.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset.indexed_dataset import IndexedDataset
from common.data.dataset.packing import pack
from common.data.dataset.sft_dataset import TRUNCATE
from common.data.dataset.shuffle import epoch_order, is_listed, order_name
from common.errors import KitError
from common.log import logger

NO_PAIR = -1


@dataclass(frozen=True)
class PairIndex:
    """The pairs that are samples, int64 [n], and what is kept of their documents: tokens [start, start + size).

    starts: int32 [n], the same for both answers, so that they keep the same prompt. sizes: int32 [n, 2], of the chosen
    and the rejected answer. truncation: what identifies the truncation, "" where no pair was truncated.
    """

    pairs: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    truncation: str = field(default="")

    @property
    def positions(self) -> np.ndarray:
        """int64 [n]: the positions of both answers; the last token of each is only a label."""
        return self.sizes.sum(1, dtype=np.int64) - 2


def build_pair_index(
    tokens: IndexedDataset, mask: IndexedDataset, pairs: range, seq_length: int, truncate: str, packing: bool
) -> PairIndex:
    """The samples among `pairs`, long ones handled by `truncate`; raises KitError when none is left.

    A pair is too long if one of its answers with its prompt has more than `seq_length` positions, or with `packing`
    both together.
    """
    if truncate not in TRUNCATE:
        raise KitError(f"TRUNCATE={truncate} is unknown: set it to one of {', '.join(TRUNCATE)}")
    lengths = tokens.lengths_of(2 * pairs.start, 2 * pairs.stop).astype(np.int64).reshape(-1, 2)
    used = lengths.sum(1) - 2 if packing else lengths.max(1, initial=0) - 1
    over = used > seq_length
    numbers = np.arange(pairs.start, pairs.stop)
    starts, sizes = np.zeros(numbers.size, np.int64), lengths
    keep = np.ones(numbers.size, bool)
    if over.any():
        _report_too_long(tokens.prefix, over, used, seq_length, truncate, packing)
        starts, sizes = _truncated(lengths, seq_length, truncate, packing)
        keep = ~over if truncate == "drop" else _has_answers(mask, numbers, starts, sizes, over)
        if truncate != "drop" and not keep.all():
            text = "%s: dropped %d pairs of which an answer has nothing to train on after truncation"
            logger.info(text, tokens.prefix.name, int((~keep).sum()))
    if not keep.any():
        raise KitError(f"{tokens.prefix}: none of the {len(pairs)} pairs of this split can be used")
    cut = bool((over & keep).any())
    truncation = f"TRUNCATE={truncate} SEQ_LENGTH={seq_length} PACKING={packing}" if cut else ""
    return PairIndex(numbers[keep], starts[keep].astype(np.int32), sizes[keep].astype(np.int32), truncation)


def _truncated(lengths: np.ndarray, seq_length: int, truncate: str, packing: bool) -> tuple[np.ndarray, np.ndarray]:
    """(starts [n], sizes [n, 2]) of documents of `lengths` [n, 2] that fit into `seq_length` positions.

    From the left both lose the same tokens of their prompt; from the right the longer one is cut first.
    """
    if truncate == "left":
        over = -(-(lengths.sum(1) - 2 - seq_length) // 2) if packing else lengths.max(1) - 1 - seq_length
        starts = np.maximum(over, 0)
        return starts, np.maximum(lengths - starts[:, None], 0)
    shorter = lengths.min(1) - 1
    limit = np.maximum(seq_length // 2, seq_length - shorter) if packing else np.full(len(lengths), seq_length)
    return np.zeros(len(lengths), np.int64), np.minimum(lengths, limit[:, None] + 1)


def _has_answers(
    mask: IndexedDataset, numbers: np.ndarray, starts: np.ndarray, sizes: np.ndarray, over: np.ndarray
) -> np.ndarray:
    """bool [n]: whether something is trained on in what is kept of both answers of a pair that is `over`."""
    keep = np.ones(numbers.size, bool)
    for i in np.flatnonzero(over).tolist():
        documents = (2 * int(numbers[i]), 2 * int(numbers[i]) + 1)
        kept = zip(documents, sizes[i].tolist(), strict=True)
        keep[i] = all(  # the first token is not a label
            size > 1 and mask.get(document, int(starts[i]) + 1, size - 1).any() for document, size in kept
        )
    return keep


def _report_too_long(
    prefix: Path, over: np.ndarray, used: np.ndarray, seq_length: int, truncate: str, packing: bool
) -> None:
    what = "with both their answers in one row (PACKING=true)" if packing else "in an answer with its prompt"
    text = (
        f"{int(over.sum())} of {over.size} pairs have more than SEQ_LENGTH={seq_length} positions {what}, the longest"
        f" {int(used.max())}"
    )
    if truncate == "error":
        apart = "PACKING=false, a row for each answer, " if packing else ""
        raise KitError(f"{prefix}: {text}: set {apart}TRUNCATE=drop, left or right, or a larger SEQ_LENGTH")
    done = {"drop": "dropped", "left": "truncated from the left", "right": "truncated from the right"}[truncate]
    logger.info("%s: %s: %s", prefix.name, text, done)


class PreferenceDataset:
    """Pairs, one a sample, or several packed into a row.

    A sample has "pairs", int64: the numbers of its pairs, and NO_PAIR up to a fixed length. Numbers count from
    `first_pair`, by which `number_datasets` tells the pairs of several datasets apart.
    identity: of the data, from its manifest.
    """

    weighted = False

    def __init__(
        self,
        pair_index: PairIndex,
        tokens: IndexedDataset,
        mask: IndexedDataset,
        *,
        seq_length: int,
        seed: int,
        packing: bool,
        pad_id: int,
        identity: str,
        listed: bool | None = None,
    ) -> None:
        self.tokens, self.mask, self.pair_index = tokens, mask, pair_index
        self.seq_length, self.seed, self.packing, self.pad_id = seq_length, seed, packing, pad_id
        self.identity, self.first_pair, self.num_pairs = identity, 0, len(tokens) // 2
        self.samples_per_epoch = number = pair_index.pairs.size
        if packing:
            self._members, self._row_starts = pack(pair_index.positions, seq_length)
            self.samples_per_epoch = self._row_starts.size - 1
        self.positions = seq_length if packing else 2 * seq_length
        self.listed = is_listed(self.samples_per_epoch) if listed is None else listed
        self.order = order_name(self.listed)
        self.filled = int(pair_index.positions.sum()) / (self.samples_per_epoch * self.positions)
        self.documents_per_sample = number / self.samples_per_epoch
        logger.info(
            "%s: %d pairs in %d samples of %d positions, %.1f%% full",
            tokens.prefix.name, number, self.samples_per_epoch, self.positions, 100 * self.filled,
        )  # fmt: skip
        self._epoch = -1

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(global_index, self.samples_per_epoch)
        self._set_epoch(epoch)
        members = self._members_of(int(self._shuffle_index[index]))
        pairs = np.full(max(1, self.seq_length // 2) if self.packing else 1, NO_PAIR, np.int64)
        pairs[: len(members)] = self.pair_index.pairs[members] + self.first_pair
        sample: dict[str, np.ndarray] = {
            "tokens": np.full(self.positions, self.pad_id, np.int64),
            "labels": np.full(self.positions, self.pad_id, np.int64),
            "loss_mask": np.zeros(self.positions, np.float32),
            "pairs": pairs,
        }
        segments = np.full(self.positions, 2 * len(members), np.int32)
        at = used = 0
        for answer, (document, start, size) in enumerate(self._answers(members)):
            end = at + size - 1
            ids = self.tokens.get(document, start, size)
            sample["tokens"][at:end], sample["labels"][at:end] = ids[:-1], ids[1:]
            sample["loss_mask"][at:end] = self.mask.get(document, start + 1, size - 1)
            segments[at:end] = answer
            used += size - 1
            at = end if self.packing else self.seq_length
        sample["num_padding"] = np.array(self.positions - used)
        if self.packing:
            sample["segment_ids"] = segments
        return sample

    def _answers(self, members: list[int]) -> Iterator[tuple[int, int, int]]:
        """(document, first token, number of tokens) of the chosen and the rejected answer of each of `members`."""
        for member in members:
            start = int(self.pair_index.starts[member])
            for answer, size in enumerate(self.pair_index.sizes[member].tolist()):
                yield 2 * int(self.pair_index.pairs[member]) + answer, start, size

    def _set_epoch(self, epoch: int) -> None:
        """Builds the order of the samples of `epoch`; that of the last epoch is kept."""
        if epoch != self._epoch:
            self._shuffle_index = epoch_order(self.samples_per_epoch, self.seed, epoch, listed=self.listed)
            self._epoch = epoch

    def _members_of(self, row: int) -> list[int]:
        """The pairs of sample `row`, as indices of `pair_index`."""
        if not self.packing:
            return [row]
        members: list[int] = self._members[self._row_starts[row] : self._row_starts[row + 1]].tolist()
        return members


def preference_datasets(samples: Iterable[Any]) -> list[PreferenceDataset]:
    """The PreferenceDatasets in `samples`, those of blends and named sets included; None is left out."""
    found: list[PreferenceDataset] = []
    for each in samples:
        if isinstance(each, PreferenceDataset):
            found.append(each)
        elif each is not None:
            found += preference_datasets(getattr(each, "members", ()))
    return found


def number_datasets(samples: Iterable[Any]) -> None:
    """Sets `first_pair` of the datasets in `samples`: those of the same files count from the same number."""
    datasets = preference_datasets(samples)
    files = {dataset.tokens.prefix: dataset.num_pairs for dataset in datasets}
    starts = dict(zip(files, np.cumsum([0, *files.values()]).tolist(), strict=False))
    for dataset in datasets:
        dataset.first_pair = starts[dataset.tokens.prefix]
