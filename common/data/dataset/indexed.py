"""Megatron's `.bin`/`.idx` files: written as they grow, read through memory maps.

`.bin`: the tokens of all documents, back to back, little-endian. `.idx`: see index_file.py; here every document is one
sequence, so there is one bound more than there are sequences.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from common.data.dataset.index_file import DTYPES, HEADER, MAGIC, open_index
from common.errors import KitError

BLOCK = 1 << 20
MAX_TOKENS = 2**31 - 1
# Those that are written for ids and for loss masks. Their signed and float namesakes of the same size are left out: a
# damaged dtype code would have the same bytes read as other numbers.
TOKEN_DTYPES = ("uint8", "uint16", "int32", "int64")
MASK_DTYPES = ("uint8", "float32")
WRITEBACK_BYTES = 32 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's type for ids of `vocab_size` tokens: uint16 below 65500, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def bin_path(prefix: Path) -> Path:
    """The data file of `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """The index file of `prefix`."""
    return Path(f"{prefix}.idx")


def sync(path: Path) -> None:
    """Makes what was written to a file, or the renames done in a folder, last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open(path: str) -> BinaryIO:
    return Path(path).open("w+b", buffering=BLOCK)


class IndexedWriter:
    """Writes one pair of files; they get their final names at `close`, the index last.

    As a context manager it closes, or removes what it wrote when an error passes through. Memory does not grow with
    the documents: lengths go to the index file at once, offsets and bounds are made from them at the end.
    largest: the largest value that `add_document` and `add_documents` were given, 0 before.
    """

    def __init__(self, prefix: Path, dtype: Any) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.num_documents = self.num_tokens = self._unsynced_bytes = 0
        self.largest: int | float = 0
        self._code = next(code for code, name in DTYPES.items() if np.dtype(name) == self.dtype)
        self._bin, self._idx = _open(f"{bin_path(prefix)}.partial"), _open(f"{idx_path(prefix)}.partial")
        self._idx.write(HEADER.pack(MAGIC, 1, self._code, 0, 0))

    def add_document(self, ids: Any) -> None:
        """Appends one document."""
        values = np.asarray(ids)
        self.add_documents(values, np.array([len(values)]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends `lengths.size` documents whose tokens lie back to back in `tokens`."""
        assert tokens.size == lengths.sum()
        self.largest = max(self.largest, tokens.max(initial=0).item())
        assert self.dtype.kind == "f" or self.largest <= np.iinfo(self.dtype).max, f"{self.largest} is no {self.dtype}"
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._idx.write(lengths.astype("<i4").tobytes())
        self._unsynced_bytes += tokens.size * self.dtype.itemsize
        if self._unsynced_bytes >= WRITEBACK_BYTES:
            self._begin_writeback()
        self.num_documents += lengths.size
        self.num_tokens += tokens.size

    def append(self, other: Path) -> None:
        """Appends all documents of the finished files `other`, as raw bytes; raises KitError for another dtype."""
        reader = IndexedReader(other)
        if reader.dtype != self.dtype:
            raise KitError(f"{other} holds {reader.dtype}, {self.prefix} {self.dtype}: they cannot be joined")
        with bin_path(other).open("rb") as source:
            shutil.copyfileobj(source, self._bin, 16 * BLOCK)
        for _, lengths in reader.length_blocks():
            self._idx.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(reader)
        self.num_tokens += reader.num_tokens

    def close(self) -> None:
        """Completes the index and gives both files their final names."""
        self._finish_index()
        for stream, final in ((self._bin, bin_path(self.prefix)), (self._idx, idx_path(self.prefix))):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            Path(stream.name).replace(final)
        sync(self.prefix.parent)

    def _begin_writeback(self) -> None:
        """Has the disk begin on what was written, so that `close` need not wait for all of it."""
        self._bin.flush()
        if hasattr(os, "posix_fadvise"):
            end = self._bin.tell()
            # Linux starts to write dirty pages that are said to be not needed; it does not wait for them.
            os.posix_fadvise(
                self._bin.fileno(), end - self._unsynced_bytes, self._unsynced_bytes, os.POSIX_FADV_DONTNEED
            )
        self._unsynced_bytes = 0

    def discard(self) -> None:
        """Removes what was written and not closed."""
        for stream in (self._bin, self._idx):
            with suppress(OSError):  # a full disk refuses what is still to be flushed
                stream.close()
            Path(stream.name).unlink(missing_ok=True)

    def _finish_index(self) -> None:
        offset = np.int64(0)
        for lengths in self._written_lengths():
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize + offset
            starts = ends - lengths.astype(np.int64) * self.dtype.itemsize
            self._idx.write(starts.astype("<i8").tobytes())
            offset = ends[-1]
        for start in range(0, self.num_documents + 1, BLOCK):
            bounds = np.arange(start, min(start + BLOCK, self.num_documents + 1), dtype="<i8")
            self._idx.write(bounds.tobytes())
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, 1, self._code, self.num_documents, self.num_documents + 1))

    def _written_lengths(self) -> Iterator[np.ndarray]:
        """The lengths in the index file, a block at a time; the file is left at its end for writing."""
        for start in range(0, self.num_documents, BLOCK):
            count = min(BLOCK, self.num_documents - start)
            self._idx.seek(HEADER.size + 4 * start)
            block = np.frombuffer(self._idx.read(4 * count), dtype="<i4")
            self._idx.seek(0, os.SEEK_END)
            yield block

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()


class IndexedReader:
    """The documents of a pair of files: `len()`, `[i]`, `get(i, offset, length)`; memory does not grow with them.

    check: read the whole index once and hold its arrays against each other; without it only its ends and the files'
    sizes are looked at, as each process of a run does once the first one has checked. Raises KitError when a file is
    missing, truncated, damaged or of another kind. It can be pickled: it opens the files anew.
    """

    def __init__(self, prefix: Path, check: bool = True) -> None:
        self.prefix = Path(prefix)
        self.index = open_index(self.prefix)
        if check:
            self.index.check()
        self.dtype, self.num_tokens = self.index.dtype, self.index.num_tokens
        self._starts, self._bounds = self._mapped("starts"), self._mapped("bounds")
        self._data = np.empty(0, self.dtype)
        if self.num_tokens:  # an empty file cannot be mapped; plain arrays are sliced faster than memmap's own
            self._data = np.asarray(np.memmap(bin_path(self.prefix), self.dtype, "r"))

    @property
    def lengths(self) -> np.ndarray:
        """int32 [documents]: tokens of each, made anew each time."""
        lengths = np.empty(len(self), np.int32)
        for first, block in self.length_blocks():
            lengths[first : first + block.size] = block
        return lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest document, 0 where there is none."""
        return max((int(lengths.max()) for _, lengths in self.length_blocks()), default=0)

    def length_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first, int64 tokens of each) of the documents [start, stop), a block at a time.

        Raises KitError for a document of more tokens than Megatron's int32 counts.
        """
        end = len(self) if stop is None else stop
        for first in range(start, end, BLOCK):
            lengths = self.lengths_of(first, min(first + BLOCK, end))
            if int(lengths.max()) > MAX_TOKENS:
                raise KitError(f"{self.prefix}: document {first + int(lengths.argmax())} has {lengths.max()} tokens")
            yield first, lengths

    def lengths_of(self, start: int, stop: int) -> np.ndarray:
        """int64: tokens of each of the documents [start, stop)."""
        sequences = self._bounds[start : stop + 1].astype(np.int64)
        first, last = int(sequences[0]), int(sequences[-1])
        # A copy of the stretch: numpy gathers slowly from where the arrays lie in the file, at odd addresses.
        starts = self._starts[first : last + 1].astype(np.int64)
        if last == self._starts.size:
            starts = np.append(starts, self.num_tokens * self.dtype.itemsize)
        return np.diff(starts[sequences - first]) // self.dtype.itemsize

    def token_starts(self, documents: np.ndarray) -> np.ndarray:
        """int64: tokens before each of `documents`; their number itself counts as one, after the last."""
        sequences = self.index.pick("bounds", documents)
        inside = sequences < self._starts.size
        starts = np.full(sequences.size, self.num_tokens, np.int64)
        starts[inside] = self.index.pick("starts", sequences[inside]) // self.dtype.itemsize
        return starts

    def __len__(self) -> int:
        return int(self._bounds.size) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.get(i)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """The tokens of document `i` from `offset` on, `length` of them at most; not copied."""
        start, end = self._token_start(i), self._token_start(i + 1)
        if length is not None:
            end = min(end, start + offset + length)
        return self._data[start + offset : end]

    def length(self, i: int) -> int:
        """Tokens of document `i`."""
        return self._token_start(i + 1) - self._token_start(i)

    def __reduce__(self) -> tuple[type, tuple[Path, bool]]:
        return IndexedReader, (self.prefix, False)

    def _token_start(self, i: int) -> int:
        sequence = int(self._bounds[i])
        return int(self._starts[sequence]) // self.dtype.itemsize if sequence < self._starts.size else self.num_tokens

    def _mapped(self, name: str) -> np.ndarray:
        offset, dtype, number = self.index.array(name)
        if number == 0:
            return np.empty(0, dtype)
        return np.asarray(np.memmap(self.index.path, dtype, "r", offset, (number,)))


def open_tokens(prefix: Path, check: bool = True) -> IndexedReader:
    """The reader of ids at `prefix`; raises KitError too when they are of a type that no ids are written in."""
    return _of_type(IndexedReader(prefix, check), TOKEN_DTYPES, "ids")


def open_mask(prefix: Path, check: bool = True) -> IndexedReader:
    """The reader of the loss mask at `prefix`; raises KitError too when it is of another type than step 1 writes."""
    return _of_type(IndexedReader(prefix, check), MASK_DTYPES, "a loss mask")


def _of_type(reader: IndexedReader, allowed: tuple[str, ...], what: str) -> IndexedReader:
    if reader.dtype.name not in allowed:
        raise KitError(
            f"{reader.index.path} says {reader.dtype.name}, {what} is of {', '.join(allowed)}: it is damaged or holds"
            " something else; copy it again, or write the data again with step 1"
        )
    return reader
