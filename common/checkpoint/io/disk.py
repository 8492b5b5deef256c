"""Files read and written past the page cache, in blocks that are on their way while others are worked on.

Copying gigabytes through the page cache costs more processor time than all that conversion does with them, and a page
fault for every few of them more still. So blocks go between the disk and a few buffers directly (O_DIRECT), where the
file system lets them; where it does not, through the cache, and written data is handed to the disk early.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.checkpoint.io.crc32 import crc32
from common.errors import KitError

T = TypeVar("T")
BLOCK_BYTES = 8 << 20
SECTOR = 4096  # direct access wants places, lengths and memory at multiples of it
BLOCKS_AHEAD = 3
BLOCKS_BEHIND = 3  # that a Writer may still be writing
MAX_OPEN_FILES = 16  # of those that are mapped; each has two descriptors
REMEDY = "give it back, or give the right path"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_END: Any = object()
_free: list[mmap.mmap] = []  # buffers of a block that nothing uses now


def ahead(items: Iterable[T], depth: int = BLOCKS_AHEAD) -> Iterator[T]:
    """`items`, in their order; up to `depth` of them are made in a thread while the caller is busy with one."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as maker:
        waiting = deque(maker.submit(next, iterator, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(maker.submit(next, iterator, _END))
            yield item
            del item  # its buffer may be used again


def _buffer(size: int) -> Any:
    """An array of at least `size` bytes, [n] uint8, at a multiple of SECTOR; that of a block is used again."""
    if size > BLOCK_BYTES + 2 * SECTOR:
        return np.frombuffer(_memory(size), np.uint8)
    try:
        memory = _free.pop()
    except IndexError:
        memory = _memory(BLOCK_BYTES + 2 * SECTOR)
    array = np.frombuffer(memory, np.uint8)
    weakref.finalize(array, _free.append, memory).atexit = False
    return array


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of any values, whose memory is used again when it is gone."""
    numel = torch.Size(shape).numel()
    return torch.from_numpy(_buffer(numel * dtype.itemsize))[: numel * dtype.itemsize].view(dtype).reshape(shape)


def _memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, _up(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _up(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


def _open(path: Path, flags: int) -> int:
    """A file descriptor that goes past the page cache where the file system knows how."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _is_direct(handle: int) -> bool:
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _made_indirect(handle: int, error: OSError) -> bool:
    """Whether `error` tells that the file system wants other multiples; then `handle` goes through the cache now."""
    if error.errno != errno.EINVAL or not _is_direct(handle):
        return False
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~os.O_DIRECT)
    return True


class DiskFile:
    """A file mapped copy-on-write: tensors share its pages, and writing to them does not reach the file.

    `load` reads a tensor that lies in it in one go. However many files there are, few of them are open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            if not self.size:
                raise KitError(f"{path} is empty: copy it again from where it came")
            self.map = _Map(path, self.size)
        except OSError as error:
            remedy = "raise the limit, as by `ulimit -n 4096`" if error.errno == errno.EMFILE else REMEDY
            raise KitError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        self.bytes = torch.from_numpy(self.map.array)
        _mapped[self.map] = _Mapped(path, self.map)

    def tensor(self, start: int, size: int, dtype: torch.dtype) -> Tensor:
        """What lies at bytes [start, start + size), [n] of `dtype`; copied only where it lies at an odd place."""
        data = self.bytes[start : start + size]
        return (data.clone() if start % dtype.itemsize else data).view(dtype)


class _Map:
    """The pages of a file; unlike mmap.mmap it keeps no descriptor. `map[a:b]` are bytes of it."""

    def __init__(self, path: Path, size: int) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            told = os.fstat(handle)
            if stat.S_ISDIR(told.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            address = _libc.mmap(None, size, protection, mmap.MAP_PRIVATE, handle, 0)
        finally:
            number = ctypes.get_errno()
            os.close(handle)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(number, os.strerror(number), str(path))
        weakref.finalize(self, _libc.munmap, address, size).atexit = False
        _libc.madvise(address, size, mmap.MADV_RANDOM)  # what is looked at in place is small; all else is loaded
        self.address, self.size, self.identity = address, size, (told.st_dev, told.st_ino)
        # By which numpy finds the memory; an array of it keeps this alive.
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}

    @property
    def array(self) -> Any:
        """All of it, [size] uint8."""
        return np.asarray(self)

    def __getitem__(self, place: slice) -> bytes:
        return bytes(self.array[place].data)


class _Handles:
    """The descriptors by which a file is read: through the page cache, and past it."""

    def __init__(self, path: Path, identity: tuple[int, int]) -> None:
        self.cached = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.cached).atexit = False
        told = os.fstat(self.cached)
        if (told.st_dev, told.st_ino) != identity:
            raise OSError(errno.ESTALE, "the file was replaced by another while it was read", str(path))
        self.direct = _open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.direct).atexit = False


class _Mapped:
    """A mapped file, found by the address of what lies in it."""

    def __init__(self, path: Path, pages: _Map) -> None:
        self.path, self.address, self.size, self._identity = path, pages.address, pages.size, pages.identity

    def _handles(self) -> _Handles:
        """Those of this file; of the files that were read least lately they are closed, when nothing reads them."""
        with _open_lock:
            handles = _open_files.pop(self, None) or _Handles(self.path, self._identity)
            _open_files[self] = handles
            while len(_open_files) > MAX_OPEN_FILES:
                del _open_files[next(iter(_open_files.keys()))]
        return handles

    def read(self, start: int, size: int) -> Tensor:
        """The bytes [start, start + size), [size] uint8; raises OSError when they cannot be read."""
        first = start - start % SECTOR
        done, end = 0, start + size - first
        array, handles = _buffer(end), self._handles()
        handle = handles.cached if self._in_cache(first, start + size) else handles.direct
        if not _is_direct(handle):
            os.posix_fadvise(handle, first, end, os.POSIX_FADV_WILLNEED)
        while done < end:
            try:
                got = os.preadv(handle, [array[done : _up(end)].data], first + done)
            except OSError as error:
                if not _made_indirect(handle, error):
                    raise
                continue
            if not got:
                raise OSError(errno.EIO, "the file has become shorter while it was read")
            done += got
        return torch.from_numpy(array)[start - first : end]

    def _in_cache(self, start: int, end: int) -> bool:
        """Whether most of these bytes are in the page cache, from which they come faster."""
        pages = -(-end // mmap.PAGESIZE) - start // mmap.PAGESIZE
        told = ctypes.create_string_buffer(pages)
        address = ctypes.c_void_p(self.address + start - start % mmap.PAGESIZE)
        return _libc.mincore(address, ctypes.c_size_t(end - start), told) == 0 and 2 * told.raw.count(1) > pages


_mapped: "weakref.WeakKeyDictionary[_Map, _Mapped]" = weakref.WeakKeyDictionary()
_open_files: "weakref.WeakKeyDictionary[_Mapped, _Handles]" = weakref.WeakKeyDictionary()  # the last read is the last
_open_lock = threading.Lock()


def load(tensor: Tensor) -> Tensor:
    """`tensor` in memory: read in one go where it lies in a mapped file, with what lies between its elements."""
    if not tensor.numel():
        return tensor
    numel = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.data_ptr(), numel * tensor.element_size()
    for file in list(_mapped.values()):
        if file.address <= start and start + size <= file.address + file.size:
            data = file.read(start - file.address, size).view(tensor.dtype)
            return data.as_strided(tensor.shape, tensor.stride(), data.storage_offset())
    return tensor


class Writer:
    """A new file, written from its beginning to its end; while blocks go to the disk, the next is put together.

    checked: `facts` tells its size and CRC-32, summed in a thread of its own, once it is closed.
    """

    def __init__(self, path: Path, *, checked: bool = False) -> None:
        self._handle = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._thread = ThreadPoolExecutor(1)
        self._summing = ThreadPoolExecutor(1) if checked else None
        self._checksum = 0
        self._block, self._free = _buffer(BLOCK_BYTES), [_buffer(BLOCK_BYTES) for _ in range(BLOCKS_BEHIND)]
        self._start, self._filled = 0, 0  # of the block that is put together: its place, and how much of it there is
        self._pending: deque[tuple[Any, list[Future[None]]]] = deque()  # blocks that are on their way, and what is done

    @property
    def facts(self) -> dict[str, int]:
        """Its "bytes" and "crc32"."""
        return {"bytes": self._start, "crc32": self._checksum}

    def write(self, data: Any) -> int:
        """How many bytes there were in `data`, all of which are taken; raises OSError when the disk refuses."""
        rest = np.frombuffer(data, np.uint8)
        size = rest.size
        while rest.size:
            part = rest[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + part.size] = part
            self._filled += part.size
            rest = rest[part.size :]
            if self._filled == BLOCK_BYTES:
                self._send()
        return size

    def _send(self) -> None:
        tasks = [self._thread.submit(self._put, self._block, self._filled, self._start)]
        if self._summing:
            tasks.append(self._summing.submit(self._sum, self._block, self._filled))
        self._pending.append((self._block, tasks))
        self._start += self._filled
        if not self._free:
            self._wait()
        self._block, self._filled = self._free.pop(), 0

    def _wait(self) -> None:
        """Returns when the block that has been on its way for longest is written; raises what went wrong."""
        block, tasks = self._pending.popleft()
        for task in tasks:
            task.result()
        self._free.append(block)

    def _sum(self, block: Any, size: int) -> None:
        self._checksum = crc32(block[:size].data, self._checksum)

    def _put(self, block: Any, size: int, start: int) -> None:
        """Writes `size` bytes at `start`; what is over in the last sector is cut off in the end."""
        done, end = 0, _up(size)
        block[size:end] = 0
        while done < end:
            try:
                done += os.pwrite(self._handle, block[done:end].data, start + done)
            except OSError as error:
                if not _made_indirect(self._handle, error):
                    raise
        if not _is_direct(self._handle) and hasattr(os, "posix_fadvise"):
            # On pages that are not written yet, this begins to write them, and drops none.
            os.posix_fadvise(self._handle, start, end, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Returns when all of the file is on the disk; raises OSError when it cannot be."""
        if self._filled:
            self._send()
        while self._pending:
            self._wait()
        os.ftruncate(self._handle, self._start)
        os.fsync(self._handle)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._thread.shutdown()
            if self._summing:
                self._summing.shutdown()
            os.close(self._handle)
