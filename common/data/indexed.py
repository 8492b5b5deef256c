"""Megatron's `.bin`/`.idx` files: written as they grow, read through memory maps.

`.bin`: the tokens of all documents, back to back, little-endian.
`.idx`: 9 bytes "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 sequences n, u64 document bounds m, then
int32[n] lengths in tokens, int64[n] byte offsets, int64[m] document bounds counted in sequences.
Source: Megatron-Core datasets/indexed_dataset.py. Here every document is one sequence, so m = n + 1.
"""

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from common.errors import KitError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
BLOCK = 1 << 20
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
    """

    def __init__(self, prefix: Path, dtype: Any) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.num_documents = self.num_tokens = self._unsynced_bytes = 0
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
        for start in range(0, len(reader), BLOCK):
            self._idx.write(reader.lengths[start : start + BLOCK].astype("<i4").tobytes())
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
    """The documents of a pair of files: `len()`, `[i]`, `get(i, offset, length)`, `lengths` int32 in tokens.

    Raises KitError when a file is missing, truncated or of another kind. It can be pickled: it opens the files anew.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        index, bounds, starts = self._read_index()
        self._lengths, self._starts = index, starts
        if bounds.size != index.size + 1 or not np.array_equal(bounds, np.arange(bounds.size)):
            # Documents of several sequences, as `--split-sentences` makes them, or of none.
            ends = np.concatenate([[0], np.cumsum(index, dtype=np.int64)])[bounds]
            self._lengths = np.diff(ends).astype(np.int32)
            self._starts = ends[:-1] * self.dtype.itemsize
        self._data = np.empty(0, self.dtype)
        if self.num_tokens:  # an empty file cannot be mapped; plain arrays are sliced faster than memmap's own
            self._data = np.asarray(np.memmap(bin_path(self.prefix), self.dtype, "r"))

    @property
    def lengths(self) -> np.ndarray:
        """int32 [documents]: tokens of each."""
        return self._lengths

    def __len__(self) -> int:
        return self._lengths.size

    def __getitem__(self, i: int) -> np.ndarray:
        return self.get(i)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """The tokens of document `i` from `offset` on, `length` of them at most; not copied."""
        start = int(self._starts[i]) // self.dtype.itemsize
        size = int(self._lengths[i])
        end = size if length is None else min(size, offset + length)
        return self._data[start + offset : start + end]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return IndexedReader, (self.prefix,)

    def _read_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lengths, document bounds, byte offsets) as memory maps; sets `dtype` and `num_tokens`."""
        path, data = idx_path(self.prefix), bin_path(self.prefix)
        for needed in (path, data):
            if not needed.is_file():
                raise KitError(f"{needed} does not exist: give the path that step 1 wrote, without .bin or .idx")
        with path.open("rb") as stream:
            head = stream.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise KitError(f"{path} is no index of Megatron's: write the data again with step 1")
        _, version, code, sequences, num_bounds = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise KitError(f"{path} has version {version} and dtype code {code}, which are not known")
        self.dtype = np.dtype(DTYPES[code])
        expected = HEADER.size + 12 * sequences + 8 * num_bounds
        if path.stat().st_size < expected:
            raise KitError(f"{path} has {path.stat().st_size} bytes of {expected}: it was cut short; write it again")
        whole = np.asarray(np.memmap(path, np.uint8, "r"))[HEADER.size :]
        lengths = whole[: 4 * sequences].view("<i4")
        starts = whole[4 * sequences : 12 * sequences].view("<i8")
        bounds = whole[12 * sequences : 12 * sequences + 8 * num_bounds].view("<i8")
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        if data.stat().st_size != self.num_tokens * self.dtype.itemsize:
            raise KitError(
                f"{data} has {data.stat().st_size} bytes where its index tells"
                f" {self.num_tokens * self.dtype.itemsize}: the two do not belong together, or it was cut short"
            )
        return lengths, bounds, starts
