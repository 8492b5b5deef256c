"""What an encoder makes of a chunk of rows."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from common.data.jsonl import Reject

DROPPED = "dropped: "
NOT_USED = "not used"
BAD_ROWS = f"{DROPPED}bad rows, written to the rejects file"


@dataclass(frozen=True)
class Encoded:
    """The documents of one chunk: arrays of tokens (and of a mask, as long) back to back, and what was counted.

    counts: "read"; "dropped: CAUSE"; "supervised"; and what the report tells under its own name.
    rejects: the rows counted under BAD_ROWS. lines: of the chunk, counted by who calls the encoder.
    """

    streams: dict[str, np.ndarray]
    lengths: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)
    lines: int = 0
