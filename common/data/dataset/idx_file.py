"""Megatron's `.idx` file: header, array offsets, and a check of the arrays against each other and the `.bin`.

Layout: 9 bytes "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 sequence count n, u64 document index count m, then
int32[n] sequence lengths in tokens, int64[n] sequence pointers in bytes, int64[m] document indices in sequences:
document i spans sequences document_indices[i] to document_indices[i + 1]. Source: Megatron-Core
datasets/indexed_dataset.py.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from common.errors import KitError, reading

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
BLOCK = 1 << 20


@dataclass(frozen=True)
class IdxFile:
    """The header of an `.idx` file, checked against the sizes of both files; `num_tokens` is that of the `.bin`."""

    path: Path
    data: Path
    dtype: np.dtype[Any]
    num_sequences: int
    num_document_indices: int
    num_tokens: int

    def array(self, name: str) -> tuple[int, str, int]:
        """(byte offset, dtype, count) of "sequence_lengths", "sequence_pointers" or "document_indices"."""
        n, m = self.num_sequences, self.num_document_indices
        return {
            "sequence_lengths": (HEADER.size, "<i4", n),
            "sequence_pointers": (HEADER.size + 4 * n, "<i8", n),
            "document_indices": (HEADER.size + 12 * n, "<i8", m),
        }[name]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of one of the arrays, copied from the file."""
        offset, dtype, _ = self.array(name)
        itemsize = np.dtype(dtype).itemsize
        with reading(self.path):
            return np.fromfile(self.path, dtype, stop - start, offset=offset + itemsize * start)

    def gather(self, name: str, indices: np.ndarray) -> np.ndarray:
        """int64: the elements of "sequence_pointers" or "document_indices" at `indices`; maps no memory."""
        offset, _, _ = self.array(name)
        with reading(self.path), self.path.open("rb", buffering=0) as stream:
            handle = stream.fileno()
            found = b"".join(os.pread(handle, 8, offset + 8 * index) for index in indices.tolist())
        return np.frombuffer(found, "<i8")

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first, elements) of one of the arrays, BLOCK elements at a time."""
        _, _, number = self.array(name)
        for start in range(0, number, BLOCK):
            yield start, self.read(name, start, min(start + BLOCK, number))

    def check_ends(self) -> None:
        """Raises KitError unless the first and last elements agree with the counts and with the size of the `.bin`."""
        n, m, size = self.num_sequences, self.num_document_indices, self.num_tokens * self.dtype.itemsize
        first, last = int(self.read("document_indices", 0, 1)[0]), int(self.read("document_indices", m - 1, m)[0])
        if (first, last) != (0, n):
            self._raise_damaged(f"its documents are sequences {first} to {last} of {n}")
        end = 0
        if n:
            pointer = int(self.read("sequence_pointers", n - 1, n)[0])
            end = pointer + int(self.read("sequence_lengths", n - 1, n)[0]) * self.dtype.itemsize
        if end != size:
            raise KitError(
                f"{self.data} has {size} bytes, but its index describes {end}:"
                " the two do not belong together, or it was truncated"
            )

    def check(self) -> None:
        """Raises KitError unless all arrays are consistent; reads the file once, block by block."""
        self._check_sequences()
        self._check_document_indices()

    def _check_sequences(self) -> None:
        """Checks that no length is negative and that each sequence starts where the one before it ends."""
        at = 0
        blocks = zip(self.blocks("sequence_lengths"), self.blocks("sequence_pointers"), strict=True)
        for (start, lengths), (_, pointers) in blocks:
            if int(lengths.min()) < 0:
                where = int(np.argmax(lengths < 0))
                self._raise_damaged(f"sequence {start + where} has a length of {lengths[where]}")
            ends = np.cumsum(lengths, dtype=np.int64)
            ends *= self.dtype.itemsize
            ends += at
            expected = np.concatenate([[at], ends[:-1]])
            if not np.array_equal(pointers, expected):
                where = int(np.argmax(pointers != expected))
                self._raise_damaged(
                    f"sequence {start + where} begins at byte {pointers[where]}, but the one before it ends at"
                    f" {expected[where]}"
                )
            at = int(ends[-1])

    def _check_document_indices(self) -> None:
        """Checks that document indices ascend, by 1 each where there are as many documents as sequences."""
        one_each = self.num_document_indices == self.num_sequences + 1
        before = 0
        for start, indices in self.blocks("document_indices"):
            steps = np.diff(indices, prepend=before)
            if int(steps.min()) < 0:
                where = int(np.argmax(steps < 0))
                self._raise_damaged(f"document index {start + where} is {indices[where]}, below the one before it")
            if one_each and int(steps[1 if start == 0 else 0 :].max(initial=1)) > 1:
                self._raise_damaged("it has as many documents as sequences, but not one sequence in each")
            before = int(indices[-1])

    def _raise_damaged(self, why: str) -> NoReturn:
        raise KitError(f"{self.path} is damaged: {why}: copy it again, or write the data again with step 1")


def open_idx(prefix: Path) -> IdxFile:
    """The `.idx` file of `prefix`, checked by its header, its ends and the sizes of both files, in constant time.

    Raises KitError when a file is missing, unreadable, truncated or of another format.
    """
    path, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with reading(prefix):
        for needed in (path, data):
            if not needed.is_file():
                raise KitError(f"{needed} does not exist: give the path that step 1 wrote, without .bin or .idx")
        with path.open("rb") as stream:
            head = stream.read(HEADER.size)
        with data.open("rb"):  # may it be read?
            sizes = path.stat().st_size, data.stat().st_size
    return _parse(path, data, head, *sizes)


def _parse(path: Path, data: Path, head: bytes, size: int, data_size: int) -> IdxFile:
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise KitError(f"{path} is not a Megatron index: write the data again with step 1")
    _, version, code, sequences, num_document_indices = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise KitError(f"{path} has version {version} and dtype code {code}, which are unknown")
    dtype = np.dtype(DTYPES[code])
    expected = HEADER.size + 12 * sequences + 8 * num_document_indices
    if size < expected:
        raise KitError(f"{path} has {size} bytes of {expected}: it was truncated; write it again")
    if size > expected or num_document_indices == 0:
        raise KitError(
            f"{path} has {size} bytes, but {sequences} sequences and {num_document_indices} document indices take"
            f" {expected}: it is damaged or holds multimodal data; write the data again with step 1"
        )
    if data_size % dtype.itemsize:
        raise KitError(
            f"{data} has {data_size} bytes, which is not a multiple of {dtype}: it was truncated, or does not belong"
            f" to {path.name}"
        )
    index = IdxFile(path, data, dtype, sequences, num_document_indices, data_size // dtype.itemsize)
    index.check_ends()
    return index
