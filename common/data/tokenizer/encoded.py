"""What an encoder makes of a chunk of rows."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from common.data.sources.jsonl import Reject

DROPPED = "dropped: "
NOT_USED = "not used"
BAD_ROWS = f"{DROPPED}bad rows, written to the rejects file"


class Piece(NamedTuple):
    """What was read of one file: its bytes in text, its lines, the rejects among them; sha256 where it is all of it."""

    text_bytes: int
    lines: int
    rejects: list[Reject]
    sha256: str | None = None


@dataclass(frozen=True)
class Encoded:
    """The documents of one chunk: arrays of tokens (and of a mask, as long) back to back, and what was counted.

    counts: "read"; "dropped: CAUSE"; "supervised"; and what the report tells under its own name.
    rejects: the rows counted under BAD_ROWS. read: what was read of each file, added by who calls the encoder.
    """

    streams: dict[str, np.ndarray]
    lengths: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)
    read: list["Piece"] = field(default_factory=list)
