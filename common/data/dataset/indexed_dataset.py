"""Megatron's `.bin`/`.idx` files: a builder that streams to disk, and a reader through memory maps.

`.bin`: the tokens of all documents, back to back, little-endian. `.idx`: see idx_file.py; every document is one
sequence here, so the document indices are 0 to the number of documents.

Hand-written: Megatron-Core's IndexedDatasetBuilder keeps all lengths in memory, neither syncs nor renames its files,
and its IndexedDataset does not check them; importing it would also load Megatron-Core into step 1.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from common.data.dataset.idx_file import DTYPES, HEADER, MAGIC, open_idx
from common.errors import KitError
from common.files import sync

BLOCK = 1 << 20
MAX_TOKENS = 2**31 - 1
# The dtypes that tokens and loss masks are written in. Signed and float types of the same size are excluded: with a
# damaged dtype code the same bytes would be read as other numbers.
TOKEN_DTYPES = ("uint8", "uint16", "int32", "int64")
MASK_DTYPES = ("uint8", "float32")
WRITEBACK_BYTES = 32 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of token ids: uint16 below 65500, else int32, as Megatron-Core's DType.optimal_dtype."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def bin_path(prefix: Path) -> Path:
    """The data file of `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """The index file of `prefix`."""
    return Path(f"{prefix}.idx")


def _open(path: str) -> BinaryIO:
    return Path(path).open("w+b", buffering=BLOCK)


class IndexedDatasetBuilder:
    """Writes one `.bin`/`.idx` pair; `finalize` gives both files their final names, the index last.

    As a context manager it finalizes, or removes its files when an error is raised. Memory does not grow with the
    documents: lengths are written at once, and pointers and document indices are computed from them at the end.
    largest: the largest value passed to `add_document` and `add_documents`, 0 before.
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
        """Appends `lengths.size` documents, whose `tokens` are back to back."""
        assert tokens.size == lengths.sum()
        self.largest = max(self.largest, tokens.max(initial=0).item())
        assert self.dtype.kind == "f" or self.largest <= np.iinfo(self.dtype).max, (
            f"{self.largest} does not fit {self.dtype}"
        )
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._idx.write(lengths.astype("<i4").tobytes())
        self._unsynced_bytes += tokens.size * self.dtype.itemsize
        if self._unsynced_bytes >= WRITEBACK_BYTES:
            self._begin_writeback()
        self.num_documents += lengths.size
        self.num_tokens += tokens.size

    def add_index(self, other: Path) -> None:
        """Appends all documents of the `.bin`/`.idx` pair `other`, as raw bytes; raises KitError for another dtype."""
        reader = IndexedDataset(other)
        if reader.dtype != self.dtype:
            raise KitError(f"{other} holds {reader.dtype}, {self.prefix} {self.dtype}: they cannot be merged")
        with bin_path(other).open("rb") as source:
            shutil.copyfileobj(source, self._bin, 16 * BLOCK)
        for _, lengths in reader.length_blocks():
            self._idx.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(reader)
        self.num_tokens += reader.num_tokens

    def finalize(self) -> None:
        """Completes the index, syncs both files and gives them their final names."""
        self._finish_index()
        for stream, final in ((self._bin, bin_path(self.prefix)), (self._idx, idx_path(self.prefix))):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            Path(stream.name).replace(final)
        sync(self.prefix.parent)

    def _begin_writeback(self) -> None:
        """Starts writing dirty pages to disk, so that `finalize` does not wait for all of them."""
        self._bin.flush()
        if hasattr(os, "posix_fadvise"):
            end = self._bin.tell()
            # On DONTNEED, Linux starts to write dirty pages and does not wait for them.
            os.posix_fadvise(
                self._bin.fileno(), end - self._unsynced_bytes, self._unsynced_bytes, os.POSIX_FADV_DONTNEED
            )
        self._unsynced_bytes = 0

    def discard(self) -> None:
        """Removes the files that were not finalized."""
        for stream in (self._bin, self._idx):
            with suppress(OSError):  # flushing fails on a full disk
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
        """The lengths in the index file, a block at a time; leaves the file at its end for writing."""
        for start in range(0, self.num_documents, BLOCK):
            count = min(BLOCK, self.num_documents - start)
            self._idx.seek(HEADER.size + 4 * start)
            block = np.frombuffer(self._idx.read(4 * count), dtype="<i4")
            self._idx.seek(0, os.SEEK_END)
            yield block

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finalize()
        finally:
            self.discard()


class IndexedDataset:
    """The documents of a `.bin`/`.idx` pair: `len()`, `[i]`, `get(i, offset, length)`, in constant memory.

    check: read and check the whole index; otherwise only its ends and the file sizes are checked, as the other ranks
    do after the first one has checked it. Raises KitError when a file is missing, truncated, damaged or of another
    format. A pickled dataset opens the files again.
    """

    def __init__(self, prefix: Path, check: bool = True) -> None:
        self.prefix = Path(prefix)
        self.index = open_idx(self.prefix)
        if check:
            self.index.check()
        self.dtype, self.num_tokens = self.index.dtype, self.index.num_tokens
        self._sequence_pointers, self._document_indices = (
            self._mapped("sequence_pointers"),
            self._mapped("document_indices"),
        )
        self._data = np.empty(0, self.dtype)
        if self.num_tokens:  # an empty file cannot be mapped; slicing a plain array is faster than slicing a memmap
            self._data = np.asarray(np.memmap(bin_path(self.prefix), self.dtype, "r"))

    @property
    def lengths(self) -> np.ndarray:
        """int32 [documents]: tokens of each, computed on every access."""
        lengths = np.empty(len(self), np.int32)
        for first, block in self.length_blocks():
            lengths[first : first + block.size] = block
        return lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest document, 0 for an empty dataset."""
        return max((int(lengths.max()) for _, lengths in self.length_blocks()), default=0)

    def length_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first, int64 tokens of each) of the documents [start, stop), a block at a time.

        Raises KitError for a document with more tokens than Megatron's int32 lengths can hold.
        """
        end = len(self) if stop is None else stop
        for first in range(start, end, BLOCK):
            lengths = self.lengths_of(first, min(first + BLOCK, end))
            if int(lengths.max()) > MAX_TOKENS:
                raise KitError(f"{self.prefix}: document {first + int(lengths.argmax())} has {lengths.max()} tokens")
            yield first, lengths

    def lengths_of(self, start: int, stop: int) -> np.ndarray:
        """int64: tokens of each of the documents [start, stop)."""
        sequences = self._document_indices[start : stop + 1].astype(np.int64)
        first, last = int(sequences[0]), int(sequences[-1])
        # Copied first: numpy is slow at gathering from the file's arrays, which are not aligned.
        starts = self._sequence_pointers[first : last + 1].astype(np.int64)
        if last == self._sequence_pointers.size:
            starts = np.append(starts, self.num_tokens * self.dtype.itemsize)
        return np.diff(starts[sequences - first]) // self.dtype.itemsize

    def token_starts(self, documents: np.ndarray) -> np.ndarray:
        """int64: tokens before each of `documents`; len(self) is valid and gives the total."""
        sequences = self.index.gather("document_indices", documents)
        inside = sequences < self._sequence_pointers.size
        starts = np.full(sequences.size, self.num_tokens, np.int64)
        starts[inside] = self.index.gather("sequence_pointers", sequences[inside]) // self.dtype.itemsize
        return starts

    def __len__(self) -> int:
        return int(self._document_indices.size) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.get(i)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """The tokens of document `i` from `offset` on, no more than `length`; not copied."""
        start, end = self._token_start(i), self._token_start(i + 1)
        if length is not None:
            end = min(end, start + offset + length)
        return self._data[start + offset : end]

    def length(self, i: int) -> int:
        """Tokens of document `i`."""
        return self._token_start(i + 1) - self._token_start(i)

    def __reduce__(self) -> tuple[type, tuple[Path, bool]]:
        return IndexedDataset, (self.prefix, False)

    def _token_start(self, i: int) -> int:
        sequence = int(self._document_indices[i])
        return (
            int(self._sequence_pointers[sequence]) // self.dtype.itemsize
            if sequence < self._sequence_pointers.size
            else self.num_tokens
        )

    def _mapped(self, name: str) -> np.ndarray:
        offset, dtype, number = self.index.array(name)
        if number == 0:
            return np.empty(0, dtype)
        return np.asarray(np.memmap(self.index.path, dtype, "r", offset, (number,)))


def open_tokens(prefix: Path, check: bool = True) -> IndexedDataset:
    """The tokens at `prefix`; also raises KitError when their dtype is not one of TOKEN_DTYPES."""
    return _check_dtype(IndexedDataset(prefix, check), TOKEN_DTYPES, "tokens")


def open_mask(prefix: Path, check: bool = True) -> IndexedDataset:
    """The loss mask at `prefix`; also raises KitError when its dtype is not one of MASK_DTYPES."""
    return _check_dtype(IndexedDataset(prefix, check), MASK_DTYPES, "loss masks")


def _check_dtype(reader: IndexedDataset, allowed: tuple[str, ...], what: str) -> IndexedDataset:
    if reader.dtype.name not in allowed:
        raise KitError(
            f"{reader.index.path} has dtype {reader.dtype.name}, but {what} have {' or '.join(allowed)}: it is damaged"
            " or holds other data; copy it again, or write the data again with step 1"
        )
    return reader
