"""Megatron's `.idx` file: its header, where its arrays lie, and whether they agree with each other and with the `.bin`.

9 bytes "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 sequences n, u64 document bounds m, then int32[n] lengths in
tokens, int64[n] byte offsets, int64[m] document bounds counted in sequences: document i is the sequences from bound i
to bound i + 1. Source: Megatron-Core datasets/indexed_dataset.py.
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
class IndexFile:
    """What the header of `path` says, held against the sizes of both files; `num_tokens` are those of the `.bin`."""

    path: Path
    data: Path
    dtype: np.dtype[Any]
    num_sequences: int
    num_bounds: int
    num_tokens: int

    def array(self, name: str) -> tuple[int, str, int]:
        """(byte offset, dtype, number) of "lengths", "starts" or "bounds"."""
        n, m = self.num_sequences, self.num_bounds
        return {
            "lengths": (HEADER.size, "<i4", n),
            "starts": (HEADER.size + 4 * n, "<i8", n),
            "bounds": (HEADER.size + 12 * n, "<i8", m),
        }[name]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of one of the arrays, copied from the file."""
        offset, dtype, _ = self.array(name)
        itemsize = np.dtype(dtype).itemsize
        with reading(self.path):
            return np.fromfile(self.path, dtype, stop - start, offset=offset + itemsize * start)

    def pick(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """int64: the elements of "starts" or "bounds" at `numbers`, of which nothing stays mapped."""
        offset, _, _ = self.array(name)
        with reading(self.path), self.path.open("rb", buffering=0) as stream:
            handle = stream.fileno()
            found = b"".join(os.pread(handle, 8, offset + 8 * number) for number in numbers.tolist())
        return np.frombuffer(found, "<i8")

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first, elements) of one of the arrays, BLOCK elements at a time."""
        _, _, number = self.array(name)
        for start in range(0, number, BLOCK):
            yield start, self.read(name, start, min(start + BLOCK, number))

    def check_ends(self) -> None:
        """Raises KitError unless the first and last elements agree with the counts and with the size of the `.bin`."""
        n, size = self.num_sequences, self.num_tokens * self.dtype.itemsize
        first, last = (
            int(self.read("bounds", 0, 1)[0]),
            int(self.read("bounds", self.num_bounds - 1, self.num_bounds)[0]),
        )
        if (first, last) != (0, n):
            self._refuse(f"its documents are sequences {first} to {last} of {n}")
        end = 0
        if n:
            end = int(self.read("starts", n - 1, n)[0]) + int(self.read("lengths", n - 1, n)[0]) * self.dtype.itemsize
        if end != size:
            raise KitError(
                f"{self.data} has {size} bytes where its index tells {end}:"
                " the two do not belong together, or it was cut short"
            )

    def check(self) -> None:
        """Raises KitError unless lengths, offsets and bounds agree everywhere; reads the file once, block by block."""
        at = 0
        for (start, lengths), (_, starts) in zip(self.blocks("lengths"), self.blocks("starts"), strict=True):
            if int(lengths.min()) < 0:
                where = int(np.argmax(lengths < 0))
                self._refuse(f"sequence {start + where} has a length of {lengths[where]}")
            ends = np.cumsum(lengths, dtype=np.int64)
            ends *= self.dtype.itemsize
            ends += at
            expected = np.concatenate([[at], ends[:-1]])
            if not np.array_equal(starts, expected):
                where = int(np.argmax(starts != expected))
                self._refuse(
                    f"sequence {start + where} begins at byte {starts[where]}, those before it end at {expected[where]}"
                )
            at = int(ends[-1])
        before = 0
        for start, bounds in self.blocks("bounds"):
            steps = np.diff(bounds, prepend=before)
            if int(steps.min()) < 0:
                where = int(np.argmax(steps < 0))
                self._refuse(f"document bound {start + where} is {bounds[where]}, under the one before it")
            if self.num_bounds == self.num_sequences + 1 and int(steps[1 if start == 0 else 0 :].max(initial=1)) > 1:
                self._refuse("it has as many documents as sequences, and not one in each")
            before = int(bounds[-1])

    def _refuse(self, why: str) -> NoReturn:
        raise KitError(f"{self.path} is damaged: {why}: copy it again, or write the data again with step 1")


def open_index(prefix: Path) -> IndexFile:
    """The index of `prefix` by its header, its ends and the sizes of both files, whatever their number of documents.

    Raises KitError when a file is missing, cannot be read, is truncated or of another kind.
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


def _parse(path: Path, data: Path, head: bytes, size: int, data_size: int) -> IndexFile:
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise KitError(f"{path} is no index of Megatron's: write the data again with step 1")
    _, version, code, sequences, num_bounds = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise KitError(f"{path} has version {version} and dtype code {code}, which are not known")
    dtype = np.dtype(DTYPES[code])
    expected = HEADER.size + 12 * sequences + 8 * num_bounds
    if size < expected:
        raise KitError(f"{path} has {size} bytes of {expected}: it was cut short; write it again")
    if size > expected or num_bounds == 0:
        raise KitError(
            f"{path} has {size} bytes, {sequences} sequences and {num_bounds} document bounds take {expected}:"
            " it is damaged or of data that is not text alone; write the data again with step 1"
        )
    if data_size % dtype.itemsize:
        raise KitError(
            f"{data} has {data_size} bytes, which are no whole number of {dtype}: it was cut short, or does not belong"
            f" to {path.name}"
        )
    index = IndexFile(path, data, dtype, sequences, num_bounds, data_size // dtype.itemsize)
    index.check_ends()
    return index
