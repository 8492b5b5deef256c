"""What happens to a row that cannot be used. Every exception that a row causes passes through `BadRows` here."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.data.sources.chunks import Chunk
from common.data.sources.row_blocks import NEWLINE, head_of_row
from common.errors import KitError


class BadRowError(Exception):
    """What is wrong with one row; `BadRows` adds its file and line."""


class LongRowError(BadRowError):
    """A row longer than MAX_ROW_BYTES."""


@contextmanager
def ignore_bad_row() -> Iterator[None]:
    """Leaves the block at an exception that one row raises; for looking ahead, since encoding reports the row."""
    try:
        yield
    except Exception as error:
        to_bad_row_error(error)


def to_bad_row_error(error: Exception) -> BadRowError:
    """`error` as a BadRowError, whatever raised it: a chat template, a tokenizer, Python's own limits.

    A KitError and a MemoryError are not caused by the row and are raised again.
    """
    if isinstance(error, BadRowError):
        return error
    if isinstance(error, (KitError, MemoryError)):
        raise error
    if isinstance(error, RecursionError):
        return BadRowError("it is nested too deeply")
    if isinstance(error, UnicodeEncodeError):
        return BadRowError(r"it holds half of a surrogate pair (\ud800 to \udfff), which is not a character")
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    place = f"{Path(frame.f_code.co_filename).name}, line {line}"
    return BadRowError(f"it cannot be used: {type(error).__name__}: {str(error)[:300]} ({place})")


class RejectedRow(NamedTuple):
    """A row that was not used: its line in the chunk, from 0, or its element in a JSON array; its bytes; the cause.

    whole: `row` holds all of its bytes, not only its head.
    """

    line: int
    row: bytes
    cause: str
    element: int | None = None
    whole: bool = True


class BadRows:
    """The rows of a chunk that cannot be used: the first raises an error, or with `skip` all are collected in `rows`.

    skip: whether ON_ERROR is skip; None for a command without that setting.
    """

    def __init__(self, chunk: Chunk, skip: bool | None = None) -> None:
        self._chunk, self._skip = chunk, skip
        self._counted = self._lines = 0  # lines in the first _counted bytes
        self.rows: list[RejectedRow] = []

    @contextmanager
    def row(self, offset: int) -> Iterator[None]:
        """Passes an exception that the row at `offset` raises in the block to `add`."""
        try:
            yield
        except Exception as error:
            self.add(offset, to_bad_row_error(error))

    def add(self, offset: int, error: BadRowError) -> None:
        """Adds the row at `offset`; raises KitError with file, line and cause unless bad rows are skipped."""
        if not self._skip:
            hint = "" if self._skip is None else " (ON_ERROR=skip leaves bad rows out and counts them)"
            raise self._chunk.error(offset, f"{error}{hint}") from None
        data, first = self._chunk.data, self._chunk.first_element
        if offset < self._counted:
            self._counted = self._lines = 0
        self._lines += data.count(NEWLINE, self._counted, offset)
        self._counted = offset
        end = data.find(NEWLINE, offset)
        row = data[offset : end if end >= 0 else len(data)]
        whole = not isinstance(error, LongRowError)
        row = row if whole else head_of_row(row, self._chunk.max_row_bytes)
        element = None if first is None else first + self._lines
        self.rows.append(RejectedRow(self._lines, row, str(error), element, whole))
