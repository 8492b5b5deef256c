"""Byte streams to blocks of whole rows; only the head of a row longer than MAX_ROW_BYTES is kept in memory."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from common.data.sources.json_array import KEPT_BYTES, elements

NEWLINE = b"\n"
MAX_ROW_BYTES = 16 << 20
STEP = 1 << 20
READ_AHEAD_BYTES = 2 << 20  # all rows of a task but the last end within this many bytes


class Block(NamedTuple):
    """Whole rows, one a line.

    size: their bytes in the uncompressed stream. cut: the full length in bytes of the last row when it is too long and
    `rows` holds only its head, else 0.
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
            rest, has_newline = skip_line(stream)
            yield _cut_block(rows, begun, len(rows) + rest, max_row_bytes, has_newline)


def skip_line(stream: BinaryIO) -> tuple[int, bool]:
    """Skips the rest of a line; returns (bytes skipped, whether the line ended with a newline)."""
    skipped, piece = 0, b""
    while not piece.endswith(NEWLINE) and (piece := stream.readline(STEP)):
        skipped += len(piece)
    return skipped, piece.endswith(NEWLINE)


def _cut_block(rows: bytes, begun: int, size: int, max_row_bytes: int, has_newline: bool) -> Block:
    """The block of `size` bytes whose last row, which starts at `begun`, is too long."""
    return Block(rows[:begun] + head_of_row(rows[begun:], max_row_bytes) + NEWLINE, size, size - begun - has_newline)


def head_of_row(row: bytes, max_row_bytes: int) -> bytes:
    """The head of a row longer than `max_row_bytes`; it ends at a character boundary, so that it decodes."""
    head = row[: min(KEPT_BYTES, max_row_bytes)]
    for lost in range(4):
        try:
            return head[: len(head) - lost].decode().encode()
        except UnicodeDecodeError:
            continue
    return head


def read_span(stream: BinaryIO, size: int, max_row_bytes: int) -> Block:
    """The next `size` bytes of `stream`, whole lines of which only the last may be very long; fewer at its end."""
    rows = _read(stream, min(size, max_row_bytes + READ_AHEAD_BYTES))
    if size <= max_row_bytes + READ_AHEAD_BYTES:
        return Block(rows, len(rows))
    begun = rows.rfind(NEWLINE) + 1
    assert begun <= READ_AHEAD_BYTES, begun
    stream.seek(size - len(rows) - 1, 1)
    last = stream.read(1)
    if not last:
        return Block(rows, len(rows))
    return _cut_block(rows, begun, size, max_row_bytes, last == NEWLINE)


def _read(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes, in as many reads as it takes; fewer at the end of the stream."""
    data = stream.read(size)
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def element_blocks(stream: BinaryIO, size: int, max_row_bytes: int) -> Iterator[Block]:
    """The elements of the JSON array in `stream`, one a line, in blocks of about `size` bytes."""
    lines, length = [], 0
    for element in elements(stream, max_row_bytes):
        cut = element.length if element.length > max_row_bytes else 0
        lines.append((head_of_row(element.text, max_row_bytes) if cut else element.text) + NEWLINE)
        length += len(lines[-1])
        if cut or length >= size:
            yield Block(b"".join(lines), length, cut)
            lines, length = [], 0
    if lines:
        yield Block(b"".join(lines), length)
