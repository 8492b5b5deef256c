"""torch's zip archives, written and read one tensor at a time.

`torch.save` holds a whole file's tensors in memory. Here a `LazyTensor` stands for a tensor in the object that is saved
and is made when its record is written; reading maps the file, so a tensor takes memory when its pages are looked at.
An archive may lie anywhere in a file: a `.distcp` file is a row of them.

Layout (caffe2/serialize/inline_container.h): `archive/data.pkl`, in which storages are persistent ids;
`archive/data/0`, ... their bytes, at multiples of 64; `archive/byteorder`, `archive/version`.
"""

import collections
import io
import itertools
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.disk import DiskFile, ahead
from common.checkpoint.io.lazy import LazyTensor
from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.pickled_tensors import PickledStorage
from common.checkpoint.untrusted.zip_records import Record, read_data_start

ALIGNMENT = 64
_MAX32 = 0xFFFFFFFF


class SupportsWrite(Protocol):
    """What takes all of the bytes it is given."""

    def write(self, data: Any, /) -> Any:
        """Takes `data`."""
        ...


@dataclass(frozen=True)
class _Storage:
    """Stands in the pickle for the bytes of one record."""

    tensor: LazyTensor
    key: str


class _Pickler(pickle.Pickler):
    """Pickles an object as torch does; `tensors` are, in order, the records data/0, data/1, ..."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, protocol=2)
        self.tensors: list[LazyTensor] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            contiguous = value.detach()
            value = LazyTensor(tuple(value.shape), value.dtype, lambda: [[contiguous]])
        if not isinstance(value, LazyTensor):
            return NotImplemented
        storage = _Storage(value, str(len(self.tensors)))
        self.tensors.append(value)
        stride = torch.empty(value.shape, device="meta").stride()
        hooks: collections.OrderedDict[int, Any] = collections.OrderedDict()
        arguments = (storage, 0, value.shape, stride, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = getattr(torch, _storage_name(value.tensor.dtype))
        return ("storage", kind, value.key, "cpu", value.tensor.numel)


def _storage_name(dtype: torch.dtype) -> str:
    """`BFloat16Storage` for torch.bfloat16."""
    empty = torch.storage.TypedStorage(wrap_storage=torch.UntypedStorage(0), dtype=dtype, _internal=True)
    return str(empty._pickle_storage_type())


class ArchiveWriter:
    """Writes `value`, whose tensors may be LazyTensors, where `stream` stands; its tensors follow, then its end."""

    def __init__(self, stream: SupportsWrite, value: Any) -> None:
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(value)
        self.tensors = pickler.tensors
        self._count = 0
        self._zip = _ZipWriter(stream)
        self._zip.write("archive/data.pkl", [pickled.getbuffer()])
        self._zip.write("archive/byteorder", [memoryview(b"little")])

    def write(self, blocks: Iterable[memoryview]) -> None:
        """Writes the next of `tensors`."""
        self._zip.write(f"archive/data/{self._count}", blocks, self.tensors[self._count].num_bytes)
        self._count += 1

    def close(self) -> int:
        """The number of bytes written, when all is."""
        assert self._count == len(self.tensors)
        self._zip.write("archive/version", [memoryview(b"3\n")])
        return self._zip.close()


def write_archives(archives: Sequence[ArchiveWriter], done: Callable[[int], None] = lambda size: None) -> list[int]:
    """The sizes of `archives`, written a tensor of each in turn: what one has in common with the next is read once.

    `done` is told the bytes of each tensor when it is written.
    """
    rounds = itertools.zip_longest(*(archive.tensors for archive in archives))
    order = [(i, tensor) for tensors in rounds for i, tensor in enumerate(tensors) if tensor is not None]
    blocks = ahead(block for _, tensor in order for block in tensor.blocks())
    for i, tensor in order:
        archives[i].write(of_size(blocks, tensor.num_bytes))
        done(tensor.num_bytes)
    assert next(blocks, None) is None
    return [archive.close() for archive in archives]


def write_archive(stream: SupportsWrite, value: Any, done: Callable[[int], None] = lambda size: None) -> int:
    """The number of bytes written: `value`, whose tensors may be LazyTensors, where `stream` stands."""
    return write_archives([ArchiveWriter(stream, value)], done)[0]


def of_size(blocks: Iterator[memoryview], size: int) -> Iterator[memoryview]:
    """The next of `blocks`, that are `size` bytes together."""
    while size:
        block = next(blocks)
        size -= block.nbytes
        yield block


class _ZipWriter:
    """Writes a zip of stored records, each at a multiple of 64 bytes from its start; zip64 where sizes need it.

    As torch does, it writes a record's checksum after its data.
    """

    def __init__(self, stream: SupportsWrite) -> None:
        self.stream = stream
        self.position = 0
        self.directory = bytearray()
        self.count = 0

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        self.stream.write(data)
        self.position += memoryview(data).nbytes

    def write(self, name: str, blocks: Iterable[memoryview], size: int | None = None) -> None:
        if size is None:
            blocks = list(blocks)
            size = sum(block.nbytes for block in blocks)
        encoded, start = name.encode(), self.position
        wide = struct.pack("<HHQQ", 1, 16, 0, 0) if size >= _MAX32 else b""
        padding = -(start + 30 + len(encoded) + len(wide) + 4) % ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        version, shown = (45, _MAX32) if wide else (20, 0)
        fixed = (0x808, 0, 0, 0x21)  # UTF-8 name, sizes and checksum behind the data; stored; 1980-01-01
        self._put(struct.pack("<4s5H3I2H", b"PK\3\4", version, *fixed, 0, shown, shown, len(encoded), len(extra)))
        self._put(encoded + extra)
        checksum, end = 0, self.position + size
        for block in blocks:
            checksum = crc32(block, checksum)
            self._put(block)
        assert self.position == end, (name, self.position, end)
        self._put(struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\7\x08", checksum, size, size))
        self._note(encoded, checksum, size, start, fixed)

    def _note(self, name: bytes, checksum: int, size: int, start: int, fixed: tuple[int, ...]) -> None:
        far = [size, size] if size >= _MAX32 else []
        far += [start] if start >= _MAX32 else []
        extra = struct.pack(f"<HH{len(far)}Q", 1, 8 * len(far), *far) if far else b""
        sizes = (checksum, min(size, _MAX32), min(size, _MAX32))
        tail = (len(name), len(extra), 0, 0, 0, 0, min(start, _MAX32))
        self.directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45 if far else 20, *fixed, *sizes, *tail)
        self.directory += name + extra
        self.count += 1

    def close(self) -> int:
        start, size = self.position, len(self.directory)
        self._put(self.directory)
        counts = (self.count, self.count)
        if start >= _MAX32 or self.count >= 0xFFFF:
            end = self.position
            self._put(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *counts, size, start))
            self._put(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
            counts = (min(self.count, 0xFFFF),) * 2
        self._put(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *counts, size, min(start, _MAX32), 0))
        return self.position


class MappedFile(DiskFile):
    """A mapped file with archives in it; `checksums` are the CRC-32 of the data of those that were read, by place."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.checksums: dict[int, int] = {}

    def read(self, offset: int = 0, length: int | None = None) -> Any:
        """The object in the archive of `length` bytes at `offset`; its tensors lie in the mapped file.

        Raises KitError when it is cut short or damaged, or asks for a global that is not known to be harmless.
        """
        length = self.size - offset if length is None else length
        end = offset + length

        def read(start: int, size: int) -> bytes:
            return self.map[offset + start : min(offset + start + size, end)]

        def make(storage: PickledStorage, record: Record) -> Any:
            start = offset + read_data_start(read, record)
            if start + record.size > end:
                raise ValueError(f"record {record.name!r} is cut short")
            data = self.bytes[start : start + record.size]
            self.checksums[offset] = record.checksum
            return _typed_storage(data if not start % 16 else data.clone(), storage.dtype)

        return ArchiveReader(read, length, self.path).load(foreign=True, make=make)


def _typed_storage(data: Tensor, dtype: torch.dtype) -> Any:
    """A storage of `dtype` that begins where `data` does."""
    start = data.storage_offset()
    storage = data.untyped_storage()[start : start + data.numel()]
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
