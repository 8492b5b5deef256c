"""The next tensor is made while the last one is written, and both disks are told early what is wanted of them.

Reading a mapped file page by page waits for each small read; writing leaves gigabytes to the final fsync. So a tensor's
pages are asked for at once when it is made, in a thread that is one tensor ahead, and what is written is handed to the
disk every few megabytes.
"""

import ctypes
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

from torch import Tensor

from common.checkpoint.lazy import LazyTensor

WRITE_BACK_BYTES = 32 << 20
_MADV_WILLNEED = 3
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class MadeTensor:
    """A tensor's bytes, with their CRC-32 where it was asked for."""

    shape: tuple[int, ...]
    data: memoryview
    checksum: int


def made_ahead(tensors: Iterable[LazyTensor], checksum: bool) -> Iterator[MadeTensor]:
    """Each tensor made, in their order; while the caller is busy with one, the next is made."""

    def make(tensor: LazyTensor) -> MadeTensor:
        data = tensor.bytes()
        return MadeTensor(tensor.shape, data, zlib.crc32(data) if checksum else 0)

    with ThreadPoolExecutor(1) as maker:
        waiting: Future[MadeTensor] | None = None
        for tensor in tensors:
            following = maker.submit(make, tensor)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


def will_need(tensor: Tensor) -> Tensor:
    """`tensor`, of whose pages the disk has been asked for all, if it lies in a mapped file."""
    size = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, end = tensor.data_ptr(), tensor.data_ptr() + size * tensor.element_size()
    start -= start % mmap.PAGESIZE
    if hasattr(_libc, "madvise"):  # a hint: where it is refused, pages come one by one
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_WILLNEED)
    return tensor


def write_all(stream: IO[bytes], data: bytes | bytearray | memoryview) -> None:
    """Writes all of `data` to an unbuffered file, whose disk begins with each part at once."""
    rest: Any = memoryview(data)
    while rest.nbytes:
        written = stream.write(rest[:WRITE_BACK_BYTES])
        rest = rest[written:]
        if written == WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
            # On pages that are not written yet, this begins to write them, and drops none.
            os.posix_fadvise(stream.fileno(), stream.tell() - written, written, os.POSIX_FADV_DONTNEED)
