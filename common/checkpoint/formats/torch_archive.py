"""The zip archives of torch.save, written and read one tensor at a time.

`torch.save` holds all tensors of a file in memory. Here the saved object contains a `LazyTensor` for each, which is
produced when its record is written; reading maps the file, so a tensor takes memory only when its data is accessed.
An archive may start anywhere in a file: a `.distcp` file is a sequence of them.

Layout (caffe2/serialize/inline_container.h): `archive/data.pkl`, with persistent ids for storages; `archive/data/0`,
... their bytes, aligned to 64; `archive/byteorder`, `archive/version`.
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
from common.checkpoint.io.direct_io import prefetch
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.checkpoint.io.mapped_file import MappedFile
from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.pickled_tensors import PickledStorage
from common.checkpoint.untrusted.zip_records import Record, read_data_start

ALIGNMENT = 64
_MAX32 = 0xFFFFFFFF


class SupportsWrite(Protocol):
    """A stream whose `write` accepts all bytes."""

    def write(self, data: Any, /) -> Any:
        """Writes `data`."""
        ...


@dataclass(frozen=True)
class _Storage:
    """The storage of a tensor, pickled as a persistent id."""

    tensor: LazyTensor
    key: str


class _Pickler(pickle.Pickler):
    """Pickles an object as torch does; `tensors` collects, in order, those of the records data/0, data/1, ..."""

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
    """Writes the pickle of `value`, whose tensors may be LazyTensors; `write` adds each tensor, `close` the end."""

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
        """Writes the data of the next of `tensors`."""
        self._zip.write(f"archive/data/{self._count}", blocks, self.tensors[self._count].num_bytes)
        self._count += 1

    def close(self) -> int:
        """Ends the archive; its size in bytes."""
        assert self._count == len(self.tensors)
        self._zip.write("archive/version", [memoryview(b"3\n")])
        return self._zip.close()


def write_archives(archives: Sequence[ArchiveWriter], on_bytes: Callable[[int], None] = lambda size: None) -> list[int]:
    """The sizes in bytes of `archives`, written in parallel, a tensor of each in turn: shared sources are read once.

    `on_bytes` is called with the size of each tensor once it is written.
    """
    rounds = itertools.zip_longest(*(archive.tensors for archive in archives))
    order = [(i, tensor) for tensors in rounds for i, tensor in enumerate(tensors) if tensor is not None]
    blocks = prefetch(block for _, tensor in order for block in tensor.blocks())
    for i, tensor in order:
        archives[i].write(take_bytes(blocks, tensor.num_bytes))
        on_bytes(tensor.num_bytes)
    assert next(blocks, None) is None
    return [archive.close() for archive in archives]


def write_archive(stream: SupportsWrite, value: Any, on_bytes: Callable[[int], None] = lambda size: None) -> int:
    """Writes `value`, whose tensors may be LazyTensors, to `stream`; the number of bytes written."""
    return write_archives([ArchiveWriter(stream, value)], on_bytes)[0]


def take_bytes(blocks: Iterator[memoryview], size: int) -> Iterator[memoryview]:
    """The next of `blocks`, which must add up to `size` bytes."""
    while size:
        block = next(blocks)
        size -= block.nbytes
        yield block


class _ZipWriter:
    """Writes a zip with uncompressed records aligned to 64 bytes; zip64 where sizes need it.

    Like torch, it writes the checksum of a record after its data. zipfile cannot align records.
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
        zip64 = struct.pack("<HHQQ", 1, 16, 0, 0) if size >= _MAX32 else b""
        padding = -(start + 30 + len(encoded) + len(zip64) + 4) % ALIGNMENT
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        version, size32 = (45, _MAX32) if zip64 else (20, 0)
        fixed = (0x808, 0, 0, 0x21)  # UTF-8 name, sizes and checksum after the data; uncompressed; 1980-01-01
        self._put(struct.pack("<4s5H3I2H", b"PK\3\4", version, *fixed, 0, size32, size32, len(encoded), len(extra)))
        self._put(encoded + extra)
        checksum, end = 0, self.position + size
        for block in blocks:
            checksum = crc32(block, checksum)
            self._put(block)
        assert self.position == end, (name, self.position, end)
        self._put(struct.pack("<4sIQQ" if zip64 else "<4sIII", b"PK\7\x08", checksum, size, size))
        self._add_to_directory(encoded, checksum, size, start, fixed)

    def _add_to_directory(self, name: bytes, checksum: int, size: int, start: int, fixed: tuple[int, ...]) -> None:
        zip64 = [size, size] if size >= _MAX32 else []
        zip64 += [start] if start >= _MAX32 else []
        extra = struct.pack(f"<HH{len(zip64)}Q", 1, 8 * len(zip64), *zip64) if zip64 else b""
        sizes = (checksum, min(size, _MAX32), min(size, _MAX32))
        tail = (len(name), len(extra), 0, 0, 0, 0, min(start, _MAX32))
        self.directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45 if zip64 else 20, *fixed, *sizes, *tail)
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


class ArchiveFile(MappedFile):
    """A mapped file that contains archives; `checksums` maps the offset of each one read to the CRC-32 of its data."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.checksums: dict[int, int] = {}

    def read(self, offset: int = 0, length: int | None = None) -> Any:
        """The object in the archive of `length` bytes at `offset`; its tensors are views of the mapped file.

        Raises KitError when it is truncated or damaged, or references a global that is not allowed.
        """
        length = self.size - offset if length is None else length
        end = offset + length

        def read(start: int, size: int) -> bytes:
            return self.map[offset + start : min(offset + start + size, end)]

        def load_storage(storage: PickledStorage, record: Record) -> Any:
            start = offset + read_data_start(read, record)
            if start + record.size > end:
                raise ValueError(f"record {record.name!r} is truncated")
            data = self.bytes[start : start + record.size]
            self.checksums[offset] = record.checksum
            return _typed_storage(data if not start % 16 else data.clone(), storage.dtype)

        return ArchiveReader(read, length, self.path).load(foreign=True, load_storage=load_storage)


def _typed_storage(data: Tensor, dtype: torch.dtype) -> Any:
    """A typed storage over the memory of `data`."""
    start = data.storage_offset()
    storage = data.untyped_storage()[start : start + data.numel()]
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
