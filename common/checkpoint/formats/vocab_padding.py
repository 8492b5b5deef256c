"""Embedding rows above `vocab_size`: vocabulary padding, or tokens that a conversion would lose."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from common.checkpoint.io.lazy_tensor import tensor_bytes
from common.errors import KitError
from common.log import logger

REMEDY = (
    "set vocab_size in its config.json to {rows} to keep them; if they are Megatron-LM's padding, whose values"
    " have no meaning, drop them with `-- --drop-rows true`"
)


class VocabPadding:
    """Tells padding from trained rows: padding is zero, or several bitwise identical rows."""

    def __init__(self) -> None:
        self.num_rows = self._num_distinct = self._num_identical = 0
        self._first: bytes | None = None  # nonzero row

    def add(self, block: Tensor) -> None:
        """Adds the next rows, [n, h] in memory."""
        data = np.frombuffer(tensor_bytes(block), np.uint8).reshape(len(block), -1)
        nonzero = data[data.any(axis=1)]
        self.num_rows += len(data)
        if not len(nonzero):
            return
        if self._first is None:
            self._first = nonzero[0].tobytes()
        identical = int((nonzero == np.frombuffer(self._first, np.uint8)).all(axis=1).sum())
        self._num_identical += identical
        self._num_distinct += len(nonzero) - identical

    @property
    def trained(self) -> bool:
        """Whether some rows may be trained: nonzero, and different from the others."""
        return bool(self._num_distinct) or self._num_identical == 1


def check_padding_rows(blocks: Iterable[Tensor], path: Path, name: str, vocab_size: int, drop_rows: bool) -> None:
    """Logs the rows of `name` above `vocab_size`, given in `blocks`, which a conversion drops.

    Raises KitError where they may be trained, unless `drop_rows` is set.
    """
    padding = VocabPadding()
    for block in blocks:
        padding.add(block)
    if not padding.num_rows:
        return
    num_rows = vocab_size + padding.num_rows
    found = f"{path}: {name} has {num_rows} rows, config.json has vocab_size={vocab_size}"
    if padding.trained and not drop_rows:
        raise KitError(
            f"{found}: the {padding.num_rows} extra rows are neither zero nor identical: {REMEDY.format(rows=num_rows)}"
        )
    kind = "hold values and are dropped (--drop-rows)" if padding.trained else "are padding (zero or identical)"
    logger.info("%s: the %d extra rows %s", found, padding.num_rows, kind)
