"""INPUT to chunks of whole rows: which files it names, and where they are cut."""

import glob
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.data.files import ENDINGS, KINDS_OF_FILES, decompressed, layout_of, readable
from common.data.json_array import ArrayError
from common.data.reading import MAX_ROW_BYTES, NEWLINE, element_blocks, line_blocks, pass_line, read_span
from common.errors import KitError


@dataclass(frozen=True)
class Span:
    """The bytes [start, end) of a file, which begin and end with a line; end None: a file that is read whole."""

    path: Path
    start: int
    end: int | None
    max_row_bytes: int = MAX_ROW_BYTES

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return (self.path.stat().st_size if self.end is None else self.end) - self.start


@dataclass(frozen=True)
class Chunk:
    """Whole rows of a file, a line each, as bytes; `start` counts uncompressed bytes, `size` those on the disk.

    first_element: the number of the first row in a file that is one JSON array; there `start` is not known.
    cut: the length in bytes of the last row where it is over max_row_bytes and `data` has its beginning alone, else 0.
    """

    path: Path
    start: int
    data: bytes
    size: int
    first_element: int | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    cut: int = 0

    def error(self, offset: int, cause: object) -> KitError:
        """The KitError for the row at `offset` of this chunk: file, line and cause."""
        return KitError(f"{self.path}, {self.place(offset)}: {cause}")

    def place(self, offset: int) -> str:
        """Which row begins at `offset`, as "line 5", or "element 5" of an array."""
        if self.first_element is not None:
            return f"element {self.first_element + self.data.count(NEWLINE, 0, offset)}"
        return f"line {Lines(self.path).number_at(self.start + offset)}"


Task = Span | Chunk


def find_inputs(text: str) -> list[Path]:
    """The files that INPUT names, in its order: a path as it stands, or words of paths, globs and folders.

    Raises KitError when a word names nothing, or a file is empty or cannot be read.
    """
    if _exists(text):
        words = [text]
    else:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise KitError(f"INPUT={text}: {error}: quote paths that hold spaces, or escape the quote") from error
    files = [file for word in words for file in _files_of(word)]
    if not files:
        raise KitError(f"INPUT is empty: give a file ({KINDS_OF_FILES}), a folder or a glob of them")
    for file in files:
        _check_readable(file)
    return files


def _exists(text: str) -> bool:
    # Not Path.exists, for which "" is "." and a list of many words a name too long.
    return os.path.exists(text)  # noqa: PTH110


def _files_of(word: str) -> list[Path]:
    # glob.glob, not Path.glob: the pattern may be absolute.
    names = [word] if _exists(word) else sorted(glob.glob(word, recursive=True))  # noqa: PTH207
    found = [Path(name) for name in names]
    if not found:
        raise KitError(f"INPUT: {word} does not exist: give a file ({KINDS_OF_FILES}), a folder or a glob of them")
    files = []
    for path in found:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
            if not inside:
                raise KitError(f"INPUT: the folder {path} holds no {' or '.join(ENDINGS)} file")
            files += inside
        else:
            files.append(path)
    return files


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            if not stream.read(1):
                raise KitError(f"{path} is empty: remove it from INPUT, or write its rows again")
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}") from error


def cut(files: list[Path], parts: int, max_row_bytes: int = MAX_ROW_BYTES) -> list[list[Span]]:
    """`parts` lists of spans that together are all files in order, about equal in bytes; some files are not cut."""
    sizes = [file.stat().st_size for file in files]
    bounds = [sum(sizes) * i // parts for i in range(parts + 1)]
    spans: list[list[Span]] = [[] for _ in range(parts)]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        whole = layout_of(file).whole
        for part in range(parts):
            low, high = bounds[part] - before, bounds[part + 1] - before
            if high <= 0 or low >= size:
                continue
            if whole:
                if low <= 0:
                    spans[part].append(Span(file, 0, None, max_row_bytes))
                continue
            start, end = (line_start(file, min(max(bound, 0), size)) for bound in (low, high))
            if start < end:
                spans[part].append(Span(file, start, end, max_row_bytes))
        before += size
    return spans


def line_start(path: Path, offset: int) -> int:
    """The first line start at or after `offset`."""
    if offset == 0:
        return 0
    with path.open("rb") as stream:
        stream.seek(offset - 1)
        pass_line(stream)
        return stream.tell()


def tasks(span: Span, size: int) -> Iterator[Task]:
    """The rows of `span` in pieces of about `size` bytes: spans that a worker reads itself, or what is read here."""
    if span.end is None:
        yield from read_chunks(span, size)
        return
    start = span.start
    while start < span.end:
        end = span.end if span.end - start <= size else min(span.end, line_start(span.path, start + size))
        yield replace(span, start=start, end=end)
        start = end


def load(task: Task) -> Chunk:
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
        yield from map(load, tasks(span, size))
        return
    layout = layout_of(span.path)
    at = disk = rows = 0
    try:
        with readable(span.path), span.path.open("rb") as raw:
            blocks = element_blocks if layout.array else line_blocks
            for block in blocks(decompressed(raw, layout.compression), size, span.max_row_bytes):
                now, first = raw.tell(), rows + 1 if layout.array else None
                yield Chunk(span.path, at, block.rows, now - disk, first, span.max_row_bytes, block.cut)
                at, disk, rows = at + block.size, now, rows + (block.rows.count(NEWLINE) if layout.array else 0)
    except ArrayError as error:
        raise KitError(f"{span.path} is one JSON array, but {error}") from error


class Lines:
    """The numbers of the lines of a file, asked for in rising order; read only when a row is to be told."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks: Iterator[Chunk] | None = None
        self._data, self._start, self._at, self._number = b"", 0, 0, 1

    def number_at(self, offset: int) -> int:
        """The number of the line that begins at uncompressed byte `offset`."""
        if self._chunks is None:
            whole = layout_of(self._path).whole
            self._chunks = read_chunks(Span(self._path, 0, None if whole else self._path.stat().st_size), 1 << 20)
        while self._start + len(self._data) < offset:
            self._number += self._data.count(NEWLINE, self._at - self._start)
            chunk = next(self._chunks)
            self._data, self._start, self._at = chunk.data, chunk.start, chunk.start
        self._number += self._data.count(NEWLINE, self._at - self._start, offset - self._start)
        self._at = offset
        return self._number
