"""Spans of input files to chunks of whole rows, the unit that a worker encodes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.data.sources.compression import decompressed, readable
from common.data.sources.file_format import detect_layout
from common.data.sources.json_array import ArrayError
from common.data.sources.row_blocks import MAX_ROW_BYTES, NEWLINE, element_blocks, line_blocks, read_span
from common.data.sources.spans import Span, line_start
from common.errors import KitError

MAX_FILES = 256  # in one FileGroup


class RowError(KitError):
    """An invalid row: its cause and its place, which is a line, an element or, where neither is known, a byte offset.

    lines: lines before the row in its chunk; after `after`, in its span.
    """

    def __init__(self, path: Path, byte: int, place: str | None, lines: int, cause: str) -> None:
        super().__init__(path, byte, place, lines, cause)
        self.path, self.byte, self.place, self.lines, self.cause = path, byte, place, lines, cause

    def __str__(self) -> str:
        return f"{self.path}, {self.place or f'the line at byte {self.byte}'}: {self.cause}"

    def after(self, lines: int) -> "RowError":
        """The same error, for a chunk that has `lines` lines before it."""
        return RowError(self.path, self.byte, self.place, self.lines + lines, self.cause)

    def at_line(self, line: int) -> "RowError":
        """The same error with its line number."""
        return RowError(self.path, self.byte, f"line {line}", self.lines, self.cause)


@dataclass(frozen=True)
class Chunk:
    """Whole rows of a file as bytes, one a line; `start` counts uncompressed bytes, `size` bytes on disk.

    first_element: the number of the first row in a JSON array, where `start` is unknown.
    first_line: the number of the first line, where known; the line at byte 0 is line 1.
    cut: the full length in bytes of the last row when it exceeds max_row_bytes and `data` holds only its head, else 0.
    """

    path: Path
    start: int
    data: bytes
    size: int
    first_element: int | None = None
    first_line: int | None = field(default=None, compare=False)
    max_row_bytes: int = MAX_ROW_BYTES
    cut: int = 0

    def error(self, offset: int, cause: object) -> RowError:
        """The error of the row at `offset` in this chunk."""
        lines, place = self.data.count(NEWLINE, 0, offset), None
        if self.first_element is not None:
            place = f"element {self.first_element + lines}"
        elif self.first_line or not self.start:
            place = f"line {(self.first_line or 1) + lines}"
        return RowError(self.path, self.start + offset, place, lines, str(cause))


@dataclass(frozen=True)
class FileGroup:
    """Short files that one worker encodes together, each a whole span."""

    spans: tuple[Span, ...]
    size: int


Task = Span | Chunk | FileGroup


def split_into_tasks(spans: list[Span], size: int) -> Iterator[tuple[Task, list[int]]]:
    """(task, indices of its spans) for `spans`, in tasks of about `size` bytes.

    Short files are grouped: a round trip to a worker takes longer than encoding such a file.
    """
    short: list[int] = []
    bytes_together = 0
    for number, span in enumerate(spans):
        on_disk = span.size
        is_short = span.start == 0 and on_disk <= size // 4 and (span.end is not None or span.short)
        if short and (not is_short or bytes_together + on_disk > size or len(short) == MAX_FILES):
            yield FileGroup(tuple(spans[each] for each in short), bytes_together), short
            short, bytes_together = [], 0
        if is_short and len(spans) > 1:
            short.append(number)
            bytes_together += on_disk
        else:
            yield from ((task, [number]) for task in split_span(span, size))
    if short:
        yield FileGroup(tuple(spans[each] for each in short), bytes_together), short


def split_span(span: Span, size: int) -> Iterator[Span | Chunk]:
    """`span` in pieces of about `size` bytes: spans that a worker reads, or for a sequential file chunks read here."""
    if span.end is None:
        yield from read_chunks(span, size)
        return
    start = span.start
    while start < span.end:
        end = span.end if span.end - start <= size else min(span.end, line_start(span.path, start + size))
        yield replace(span, start=start, end=end)
        start = end


def load_chunk(task: Span | Chunk) -> Chunk:
    """The rows of `task`; raises KitError when the file cannot be read or has shrunk."""
    if isinstance(task, Chunk):
        return task
    with readable(task.path), task.path.open("rb", buffering=0) as stream:
        stream.seek(task.start)
        block = read_span(stream, task.size, task.max_row_bytes)
    if block.size < task.size:
        raise KitError(f"{task.path} changed while it was being read: run the same command again")
    return Chunk(task.path, task.start, block.rows, task.size, max_row_bytes=task.max_row_bytes, cut=block.cut)


def read_chunks(span: Span, size: int) -> Iterator[Chunk]:
    """The rows of `span` in chunks of about `size` bytes; raises KitError when the file cannot be read."""
    if span.end is not None:
        row = 1
        for chunk in map(load_chunk, split_span(span, size)):
            yield replace(chunk, first_line=None if span.start else row)
            row += chunk.data.count(NEWLINE)
        return
    layout = detect_layout(span.path)
    try:
        with readable(span.path), span.path.open("rb") as raw:
            stream = decompressed(raw, layout.compression)
            blocks = element_blocks if layout.array else line_blocks
            at = disk = 0
            row = 1
            for block in blocks(stream, size, span.max_row_bytes):
                now = raw.tell()
                element, line = (row, None) if layout.array else (None, row)
                yield Chunk(span.path, at, block.rows, now - disk, element, line, span.max_row_bytes, block.cut)
                at, disk, row = at + block.size, now, row + block.rows.count(NEWLINE)
    except ArrayError as error:
        raise KitError(f"{span.path} is a JSON array, but {error}") from error
