"""Input files to parts, and parts to chunks of whole rows: where they are cut, and what is said of a row's place."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from common.data.sources.files import decompressed, layout_of, readable
from common.data.sources.json_array import ArrayError
from common.data.sources.reading import MAX_ROW_BYTES, NEWLINE, element_blocks, line_blocks, pass_line, read_span
from common.errors import KitError

PART_BYTES = 1 << 30
COMPRESSED_WEIGHT = 4  # text is about so many times as long as it is compressed
MAX_FILES = 256  # that go to a worker together


@dataclass(frozen=True)
class Span:
    """The bytes [start, end) of a file, which begin and end with a line; end None: a file that is read whole.

    file: its number among the inputs. short: of a file that is read whole, it holds little, inflated too.
    """

    path: Path
    start: int
    end: int | None
    file: int = 0
    max_row_bytes: int = MAX_ROW_BYTES
    short: bool = False

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return (self.path.stat().st_size if self.end is None else self.end) - self.start


class RowError(KitError):
    """What is wrong with a row, and where it is: its line or element, or the byte where only that is known.

    lines: those that stand before it in its chunk, or in its span after `after`.
    """

    def __init__(self, path: Path, byte: int, place: str | None, lines: int, cause: str) -> None:
        super().__init__(path, byte, place, lines, cause)
        self.path, self.byte, self.place, self.lines, self.cause = path, byte, place, lines, cause

    def __str__(self) -> str:
        return f"{self.path}, {self.place or f'the line at byte {self.byte}'}: {self.cause}"

    def after(self, lines: int) -> "RowError":
        """The same of a row whose chunk has so many lines before it."""
        return RowError(self.path, self.byte, self.place, self.lines + lines, self.cause)

    def at_line(self, line: int) -> "RowError":
        """The same of a row whose line is known."""
        return RowError(self.path, self.byte, f"line {line}", self.lines, self.cause)


@dataclass(frozen=True)
class Chunk:
    """Whole rows of a file, a line each, as bytes; `start` counts uncompressed bytes, `size` those on the disk.

    first_element: the number of the first row in a file that is one JSON array; there `start` is not known.
    first_line: the number of the first line, where it is known; that at byte 0 is the first.
    cut: the length in bytes of the last row where it is over max_row_bytes and `data` has its beginning alone, else 0.
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
        """The error for the row at `offset` of this chunk: file, place and cause."""
        lines, place = self.data.count(NEWLINE, 0, offset), None
        if self.first_element is not None:
            place = f"element {self.first_element + lines}"
        elif self.first_line or not self.start:
            place = f"line {(self.first_line or 1) + lines}"
        return RowError(self.path, self.start + offset, place, lines, str(cause))


@dataclass(frozen=True)
class Files:
    """Short files, one after the other, each a whole span."""

    spans: tuple[Span, ...]
    size: int


Task = Span | Chunk | Files


def whole_spans(files: list[Path], max_row_bytes: int = MAX_ROW_BYTES) -> list[Span]:
    """Each of `files` as one span; raises KitError when one cannot be read."""
    spans = []
    for number, file in enumerate(files):
        layout = layout_of(file)
        end = None if layout.whole else file.stat().st_size
        spans.append(Span(file, 0, end, number, max_row_bytes, layout.short))
    return spans


def cut(spans: list[Span], partitions: int = 1) -> list[list[Span]]:
    """The parts of the work: lists of spans that together are `spans`, the inputs, in order.

    A part is PART_BYTES of one file, or whole smaller files of at most as many together: a long file's parts depend
    neither on other files nor on what is appended to it. For at least `partitions` parts that size is halved until it
    fits. What can be read from its beginning only is not cut; compressed, it counts more.
    """
    sizes = [span.size for span in spans]
    unit = PART_BYTES
    while partitions > 1 and unit > 1 and sum(sizes) // unit < 2 * partitions:
        unit //= 2
    parts: list[list[Span]] = []
    group: list[Span] = []
    weight = 0
    for span, size in zip(spans, sizes, strict=True):
        here = size * COMPRESSED_WEIGHT if span.end is None else size
        if group and weight + here > unit:
            parts.append(group)
            group, weight = [], 0
        if here >= unit:
            parts += [[piece] for piece in _pieces(span, unit)]
        else:
            group.append(span)
            weight += here
    return [*parts, group] if group else parts


def _pieces(span: Span, unit: int) -> list[Span]:
    """`span`, a file, cut at the first line start at or after each multiple of `unit` bytes."""
    if span.end is None:
        return [span]
    edges, at = [0], unit
    while at < span.end:
        edges.append(min(line_start(span.path, at), span.end))
        at = (edges[-1] // unit + 1) * unit
    if edges[-1] < span.end:
        edges.append(span.end)
    return [replace(span, start=start, end=end) for start, end in pairwise(edges)]


def line_start(path: Path, offset: int) -> int:
    """The first line start at or after `offset`."""
    if offset == 0:
        return 0
    with path.open("rb") as stream:
        stream.seek(offset - 1)
        pass_line(stream)
        return stream.tell()


def tasks(spans: list[Span], size: int) -> Iterator[tuple[Task, list[int]]]:
    """The rows of `spans` in pieces of about `size` bytes, with the numbers of the spans that they are of.

    Short files come together: the way to a worker and back takes longer than such a file.
    """
    short: list[int] = []
    bytes_together = 0
    for number, span in enumerate(spans):
        on_disk = span.size
        is_short = span.start == 0 and on_disk <= size // 4 and (span.end is not None or span.short)
        if short and (not is_short or bytes_together + on_disk > size or len(short) == MAX_FILES):
            yield Files(tuple(spans[each] for each in short), bytes_together), short
            short, bytes_together = [], 0
        if is_short and len(spans) > 1:
            short.append(number)
            bytes_together += on_disk
        else:
            yield from ((task, [number]) for task in pieces_of(span, size))
    if short:
        yield Files(tuple(spans[each] for each in short), bytes_together), short


def pieces_of(span: Span, size: int) -> Iterator[Span | Chunk]:
    """The rows of `span` in pieces of about `size` bytes: spans that a worker reads itself, or what is read here."""
    if span.end is None:
        yield from read_chunks(span, size)
        return
    start = span.start
    while start < span.end:
        end = span.end if span.end - start <= size else min(span.end, line_start(span.path, start + size))
        yield replace(span, start=start, end=end)
        start = end


def load(task: Span | Chunk) -> Chunk:
    """The rows of `task`; raises KitError when the file cannot be read, or is shorter than it was."""
    if isinstance(task, Chunk):
        return task
    with readable(task.path), task.path.open("rb", buffering=0) as stream:
        stream.seek(task.start)
        block = read_span(stream, task.size, task.max_row_bytes)
    if block.size < task.size:
        raise KitError(f"{task.path} was changed while it was read: run the same command again")
    return Chunk(task.path, task.start, block.rows, task.size, max_row_bytes=task.max_row_bytes, cut=block.cut)


def read_chunks(span: Span, size: int) -> Iterator[Chunk]:
    """The rows of `span` in chunks of about `size` bytes; raises KitError when the file cannot be read."""
    if span.end is not None:
        row = 1
        for chunk in map(load, pieces_of(span, size)):
            yield replace(chunk, first_line=None if span.start else row)
            row += chunk.data.count(NEWLINE)
        return
    layout = layout_of(span.path)
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
        raise KitError(f"{span.path} is one JSON array, but {error}") from error
