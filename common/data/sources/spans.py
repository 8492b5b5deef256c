"""Byte ranges of the input files, and how they are split into parts."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from common.data.sources.file_format import detect_layout
from common.data.sources.row_blocks import MAX_ROW_BYTES, skip_line

PART_BYTES = 1 << 30
COMPRESSED_WEIGHT = 4  # the usual compression ratio of text


@dataclass(frozen=True)
class Span:
    """The bytes [start, end) of a file, whole lines; end is None for a file that is read sequentially.

    file: its index among the inputs. short: for a sequential file, whether its decompressed content is short.
    """

    path: Path
    start: int
    end: int | None
    file: int = 0
    max_row_bytes: int = MAX_ROW_BYTES
    short: bool = False

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return (self.path.stat().st_size if self.end is None else self.end) - self.start


def whole_spans(files: list[Path], max_row_bytes: int = MAX_ROW_BYTES) -> list[Span]:
    """One span for each of `files`; raises KitError when a file cannot be read."""
    spans = []
    for number, file in enumerate(files):
        layout = detect_layout(file)
        end = None if layout.sequential else file.stat().st_size
        spans.append(Span(file, 0, end, number, max_row_bytes, layout.short))
    return spans


def split_into_parts(spans: list[Span], partitions: int = 1) -> list[list[Span]]:
    """The parts of the work: lists of spans that cover `spans` in order.

    A part is PART_BYTES of one file, or several smaller files that total PART_BYTES or less. So the parts of a large
    file depend neither on other files nor on data appended later. The size is halved until each of `partitions` gets
    parts. Sequential files are not split; their size counts COMPRESSED_WEIGHT times.
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
            parts += [[piece] for piece in _split_file(span, unit)]
        else:
            group.append(span)
            weight += here
    return [*parts, group] if group else parts


def _split_file(span: Span, unit: int) -> list[Span]:
    """`span`, a whole file, split at the first line start at or after each multiple of `unit` bytes."""
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
        skip_line(stream)
        return stream.tell()
