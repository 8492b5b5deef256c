"""What an encoder makes of a chunk of rows, and how it gets there from lists of ids."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from common.data.indexed import token_dtype


@dataclass(frozen=True)
class Encoded:
    """The documents of one chunk: arrays of tokens (and of a mask, as long) back to back, and what was counted.

    counts: "read"; "dropped: CAUSE"; "supervised"; and what the report tells under its own name.
    """

    streams: dict[str, np.ndarray]
    lengths: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)


def join(documents: list[list[int]], vocab_size: int) -> np.ndarray:
    """The ids of all documents back to back, in the dtype that files of `vocab_size` tokens have."""
    return np.fromiter(chain.from_iterable(documents), token_dtype(vocab_size), sum(map(len, documents)))


def sizes(documents: list[list[int]]) -> np.ndarray:
    """int32 [documents]: tokens of each."""
    return np.fromiter(map(len, documents), np.int32, len(documents))
