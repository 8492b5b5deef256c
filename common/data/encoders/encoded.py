"""What an encoder returns for a chunk of rows."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from common.data.sources.bad_rows import RejectedRow

DROPPED = "dropped: "
BAD_ROWS = f"{DROPPED}bad rows, written to the rejects file"


class FileCounts(NamedTuple):
    """What was read from one file: uncompressed bytes, lines and rejected rows; sha256 when it is the whole file."""

    text_bytes: int
    lines: int
    rejects: list[RejectedRow]
    sha256: str | None = None


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of one chunk: their tokens (and a loss mask of the same length) back to back, and counts.

    counts: "read"; "dropped: CAUSE"; "supervised"; others are logged under their own name.
    rejects: the rows counted under BAD_ROWS. read: what was read from each file, filled in by the worker.
    """

    streams: dict[str, np.ndarray]
    lengths: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)
    rejects: list[RejectedRow] = field(default_factory=list)
    read: list["FileCounts"] = field(default_factory=list)
