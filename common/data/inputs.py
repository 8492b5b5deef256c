"""INPUT to chunks of whole lines: which files it names, and where they are cut."""

import glob
import gzip
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import KitError


@dataclass(frozen=True)
class Span:
    """The bytes [start, end) of a file, which begin and end with a line; a .gz file is always whole (end None)."""

    path: Path
    start: int
    end: int | None


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file, as bytes; `start` counts uncompressed bytes, `size` those read from the disk."""

    path: Path
    start: int
    data: bytes
    size: int

    def error(self, offset: int, cause: object) -> KitError:
        """The KitError for the row at `offset` of this chunk: file, line and cause."""
        return KitError(f"{self.path}, line {_line_number(self.path, self.start + offset)}: {cause}")


def find_inputs(text: str) -> list[Path]:
    """The files that INPUT names: a path as it stands, or words of paths and globs; a folder gives its jsonl files.

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
        raise KitError("INPUT is empty: give a .jsonl file, a folder or a glob of them")
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
        raise KitError(f"INPUT: {word} does not exist: give a .jsonl file, a folder or a glob of them")
    files = []
    for path in found:
        if path.is_dir():
            inside = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
            if not inside:
                raise KitError(f"INPUT: the folder {path} holds no .jsonl or .jsonl.gz file")
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


def cut(files: list[Path], parts: int) -> list[list[Span]]:
    """`parts` lists of spans that together are all files in order, about equal in bytes; a .gz file is not cut."""
    sizes = [file.stat().st_size for file in files]
    bounds = [sum(sizes) * i // parts for i in range(parts + 1)]
    spans: list[list[Span]] = [[] for _ in range(parts)]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        for part in range(parts):
            low, high = bounds[part] - before, bounds[part + 1] - before
            if file.suffix == ".gz":
                if low <= 0 < high:
                    spans[part].append(Span(file, 0, None))
                continue
            start, end = (_line_start(file, min(max(bound, 0), size)) for bound in (low, high))
            if start < end:
                spans[part].append(Span(file, start, end))
        before += size
    return spans


def _line_start(path: Path, offset: int) -> int:
    """The first line start at or after `offset`."""
    if offset == 0:
        return 0
    with path.open("rb") as stream:
        stream.seek(offset - 1)
        stream.readline()
        return stream.tell()


def read_chunks(span: Span, size: int) -> Iterator[Chunk]:
    """The lines of `span` in chunks of about `size` bytes; raises KitError when the file cannot be read."""
    try:
        with span.path.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if span.end is None else raw
            stream.seek(span.start)
            yield from _read(span, raw, stream, size)
    except (OSError, EOFError) as error:
        raise KitError(f"{span.path} cannot be read: {error}") from error


def _read(span: Span, raw: BinaryIO, stream: BinaryIO, size: int) -> Iterator[Chunk]:
    at, disk = span.start, raw.tell()
    while span.end is None or at < span.end:
        data = stream.read(size if span.end is None else min(size, span.end - at))
        if not data:
            return
        if not data.endswith(b"\n"):
            data += stream.readline()
        yield Chunk(span.path, at, data, raw.tell() - disk)
        at, disk = at + len(data), raw.tell()


def _line_number(path: Path, offset: int) -> int:
    """The number of the line that begins at uncompressed byte `offset`; read only when an error is told."""
    count = 1
    for chunk in read_chunks(Span(path, 0, None if path.suffix == ".gz" else offset), 1 << 20):
        if chunk.start + len(chunk.data) >= offset:
            return count + chunk.data[: offset - chunk.start].count(b"\n")
        count += chunk.data.count(b"\n")
    return count
