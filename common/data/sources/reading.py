"""Bytes to blocks of whole rows; of a row of more than MAX_ROW_BYTES only the beginning is kept in memory."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from common.data.sources.json_array import KEPT_BYTES, elements

NEWLINE = b"\n"
MAX_ROW_BYTES = 16 << 20
STEP = 1 << 20
AT_ONCE = 2 << 20  # a task's rows but the last begin within so many bytes


class Block(NamedTuple):
    """Whole rows, a line each.

    size: what they take in the uncompressed stream; cut: the length in bytes of the last one when it is too long and
    `rows` holds its beginning alone, else 0.
    """

    rows: bytes
    size: int
    cut: int = 0


def line_blocks(stream: BinaryIO, size: int, max_row_bytes: int) -> Iterator[Block]:
    """The lines of `stream` in blocks of about `size` bytes."""
    while rows := stream.read(size):
        begun = rows.rfind(NEWLINE) + 1
        room = max_row_bytes + 1 - (len(rows) - begun)
        more = stream.readline(room) if room > 0 and begun < len(rows) else b""
        rows += more
        if begun == len(rows) or rows.endswith(NEWLINE) or (room > 0 and len(more) < room):
            yield Block(rows, len(rows))
        else:
            rest, has_newline = pass_line(stream)
            yield _cut(rows, begun, len(rows) + rest, max_row_bytes, has_newline)


def pass_line(stream: BinaryIO) -> tuple[int, bool]:
    """Passes over what is left of a line: (how many bytes that was, whether a newline was the last)."""
    number, piece = 0, b""
    while not piece.endswith(NEWLINE) and (piece := stream.readline(STEP)):
        number += len(piece)
    return number, piece.endswith(NEWLINE)


def _cut(rows: bytes, begun: int, size: int, max_row_bytes: int, has_newline: bool) -> Block:
    """The block whose last row, from `begun` on, is too long; `size` bytes with it."""
    return Block(rows[:begun] + beginning(rows[begun:], max_row_bytes) + NEWLINE, size, size - begun - has_newline)


def beginning(row: bytes, max_row_bytes: int) -> bytes:
    """What is kept of a row of more than `max_row_bytes`; it ends with a whole character, so that it shows as text."""
    head = row[: min(KEPT_BYTES, max_row_bytes)]
    for lost in range(4):
        try:
            return head[: len(head) - lost].decode().encode()
        except UnicodeDecodeError:
            continue
    return head


def read_span(stream: BinaryIO, size: int, max_row_bytes: int) -> Block:
    """The next `size` bytes of `stream`, whole lines of which only the last may be very long; fewer where it ends."""
    rows = _read(stream, min(size, max_row_bytes + AT_ONCE))
    if size <= max_row_bytes + AT_ONCE:
        return Block(rows, len(rows))
    begun = rows.rfind(NEWLINE) + 1
    assert begun <= AT_ONCE, begun
    stream.seek(size - len(rows) - 1, 1)
    last = stream.read(1)
    if not last:
        return Block(rows, len(rows))
    return _cut(rows, begun, size, max_row_bytes, last == NEWLINE)


def _read(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes, which one call may not give."""
    data = stream.read(size)
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def element_blocks(stream: BinaryIO, size: int, max_row_bytes: int) -> Iterator[Block]:
    """The elements of the JSON array in `stream`, each on a line, in blocks of about `size` bytes."""
    lines, length = [], 0
    for element in elements(stream, max_row_bytes):
        cut = element.length if element.length > max_row_bytes else 0
        lines.append((beginning(element.text, max_row_bytes) if cut else element.text) + NEWLINE)
        length += len(lines[-1])
        if cut or length >= size:
            yield Block(b"".join(lines), length, cut)
            lines, length = [], 0
    if lines:
        yield Block(b"".join(lines), length)
