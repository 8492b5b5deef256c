"""Rows of an embedding above `vocab_size`: those that pad it, told apart from words that would be lost."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from common.checkpoint.io.lazy_tensor import tensor_bytes
from common.errors import KitError
from common.log import logger

WAYS = (
    "set vocab_size in its config.json to {rows} to keep them; if they are Megatron-LM's padding, whose values mean"
    " nothing, leave them out by `-- --drop-rows true`"
)


class Padding:
    """Counts rows that stand for no word: they are zero, or several that are alike to the bit."""

    def __init__(self) -> None:
        self.rows = self.others = self._alike = 0
        self._first: bytes | None = None  # of those that are not zero

    def add(self, block: Tensor) -> None:
        """Takes the next rows, [n, h] in memory."""
        data = np.frombuffer(tensor_bytes(block), np.uint8).reshape(len(block), -1)
        filled = data[data.any(axis=1)]
        self.rows += len(data)
        if not len(filled):
            return
        if self._first is None:
            self._first = filled[0].tobytes()
        alike = int((filled == np.frombuffer(self._first, np.uint8)).all(axis=1).sum())
        self._alike += alike
        self.others += len(filled) - alike

    @property
    def trained(self) -> bool:
        """Whether some of them may be words: they hold values, and those of no other row."""
        return bool(self.others) or self._alike == 1


def check_rows(above: Iterable[Tensor], where: Path, name: str, vocab_size: int, drop_rows: bool) -> None:
    """Tells of the rows of `name` from `vocab_size` on, which a conversion leaves out.

    Raises KitError where they may be words, unless `drop_rows` says to leave those out too.
    """
    padding = Padding()
    for block in above:
        padding.add(block)
    if not padding.rows:
        return
    rows = vocab_size + padding.rows
    told = f"{where}: {name} has {rows} rows, and config.json says vocab_size={vocab_size}"
    if padding.trained and not drop_rows:
        raise KitError(
            f"{told}: the {padding.rows} above hold values, neither zero nor alike: {WAYS.format(rows=rows)}"
        )
    kind = "hold values, and are left out, as --drop-rows says" if padding.trained else "pad it (zero, or alike)"
    logger.info("%s: the %d above %s", told, padding.rows, kind)
