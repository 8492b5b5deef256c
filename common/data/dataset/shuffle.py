"""Shuffles of samples and documents that depend only on seed and epoch, with random access to any position.

Up to MAX_LISTED elements the order is a list in memory, as Megatron's shuffle index, of some MiB per process. Beyond,
samples are permuted by a Feistel network, and documents are shuffled group by group, so that a start takes neither
time nor memory for them. No library that the kit uses has a permutation with random access.
"""

from collections.abc import Iterator
from typing import Protocol, TypeVar

import numpy as np

from common.data.dataset.indexed_dataset import IndexedDataset

Place = TypeVar("Place", int, np.ndarray)
MAX_LISTED = 1 << 18
GROUP = 1 << 11
ROUNDS = 8
BITS_64 = (1 << 64) - 1
WINDOWS, DOCUMENTS = 1, 2  # spawn keys, so that no two generators are the same


class DocumentOrder(Protocol):
    """Documents in some order, concatenated."""

    def parts(self, position: int) -> Iterator[tuple[int, int]]:
        """(document, offset in it) of the token at `position`, then the following documents with offset 0."""
        ...


class KeyedPermutation:
    """A permutation of range(size) in constant memory: `[i]` of an int, or of an array of uint64.

    A Feistel network over the smallest power of two that holds `size`, applied until the result is below `size`: cycle
    walking, Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002).
    """

    def __init__(self, size: int, random: np.random.SeedSequence) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low, self._high = bits // 2, bits - bits // 2
        self._keys = [int(key) for key in random.generate_state(ROUNDS, np.uint64)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Place) -> Place:
        if isinstance(i, np.ndarray):
            places = self._once(i.astype(np.uint64))
            while (outside := places >= self.size).any():
                places[outside] = self._once(places[outside])
            return places
        place = self._once(int(i))
        while place >= self.size:
            place = self._once(place)
        return place

    def _once(self, i: Place) -> Place:
        left, right = i >> self._low, i & ((1 << self._low) - 1)
        for number, key in enumerate(self._keys):
            if number % 2:
                right = right ^ (_mix(left ^ key) >> (64 - self._low))
            else:
                left = left ^ (_mix(right ^ key) >> (64 - self._high))
        return (left << self._low) | right


def _mix(x: Place) -> Place:
    """A 64-bit hash of 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS_64
    return x ^ (x >> 31)


ShuffleIndex = np.ndarray | KeyedPermutation


class ListedDocumentOrder:
    """All documents in a random order that is listed in memory: 16 bytes per document."""

    def __init__(self, tokens: IndexedDataset, documents: range, random: np.random.Generator) -> None:
        order = random.permutation(len(documents))
        self._ends = np.cumsum(tokens.lengths_of(documents.start, documents.stop)[order])
        self._documents = order + documents.start

    def parts(self, position: int) -> Iterator[tuple[int, int]]:
        """See DocumentOrder."""
        yield from _walk_from(self._documents, self._ends, position)


class GroupedDocumentOrder:
    """Groups of GROUP consecutive documents in random order, and the documents of each group in random order.

    Group boundaries are random too, so that epochs have different groups. A group takes 24 bytes; its own order is
    computed on access. This is the two-level shuffle of CorgiPile (Xu et al., SIGMOD 2022), which trains as well as a
    full shuffle.
    """

    def __init__(self, tokens: IndexedDataset, documents: range, seed: int, epoch: int) -> None:
        self._tokens, self._seed, self._epoch = tokens, seed, epoch
        random = self._random(0)
        first = documents.start + int(random.integers(1, GROUP, endpoint=True))
        edges = np.arange(first, documents.stop, GROUP)
        self._edges = np.concatenate([[documents.start], edges, [documents.stop]])
        self._groups = random.permutation(self._edges.size - 1)
        self._ends = np.cumsum(np.diff(tokens.token_starts(self._edges))[self._groups])

    def parts(self, position: int) -> Iterator[tuple[int, int]]:
        """See DocumentOrder."""
        for group, offset in _walk_from(self._groups, self._ends, position):
            start, stop = self._edges[group : group + 2].tolist()
            order = self._random(1 + group).permutation(stop - start)
            ends = np.cumsum(self._tokens.lengths_of(start, stop)[order])
            yield from _walk_from(order + start, ends, offset)

    def _random(self, number: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(self._epoch, DOCUMENTS, number)))


def _walk_from(members: np.ndarray, ends: np.ndarray, position: int) -> Iterator[tuple[int, int]]:
    """(member, offset in it) at `position` of members that end at `ends`, then the following ones with offset 0."""
    first = int(np.searchsorted(ends, position, side="right"))
    offset = position - (int(ends[first - 1]) if first else 0)
    for member in members[first:]:
        yield int(member), offset
        offset = 0


def is_listed(*sizes: int) -> bool:
    """Whether an order of so many elements is listed in memory."""
    return sum(sizes) <= MAX_LISTED


def order_name(listed: bool) -> str:
    """The name of the shuffle in checkpoints; another algorithm needs another name."""
    return "listed" if listed else "keyed"


def keyed_shuffle(size: int, seed: int, epoch: int) -> KeyedPermutation:
    """The order of the `size` samples of an epoch that are too many to be listed."""
    return KeyedPermutation(size, np.random.SeedSequence(seed, spawn_key=(epoch, WINDOWS)))


def epoch_order(size: int, seed: int, epoch: int, *, listed: bool) -> ShuffleIndex:
    """The order of the `size` samples of an epoch, listed in memory or computed from their number."""
    return np.random.default_rng([seed, epoch]).permutation(size) if listed else keyed_shuffle(size, seed, epoch)
