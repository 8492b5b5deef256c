"""Memory-mapped files: small values are read in place, tensors are loaded in one direct read."""

import ctypes
import errno
import mmap
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checkpoint.io.direct_io import SECTOR, aligned_buffer, disable_direct, is_direct, open_direct, round_up
from common.errors import KitError

MAX_OPEN_FILES = 16  # of the mapped ones; each has two descriptors
REMEDY = "restore it, or give the right path"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MappedFile:
    """A file mapped copy-on-write: tensors share its pages, and writing to them does not change the file.

    `load` reads a tensor of it in one go. However many files are mapped, only MAX_OPEN_FILES are open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            if not self.size:
                raise KitError(f"{path} is empty: copy it again from its source")
            self.map = _Mapping(path, self.size)
        except OSError as error:
            remedy = "raise the limit, as by `ulimit -n 4096`" if error.errno == errno.EMFILE else REMEDY
            raise KitError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        self.bytes = torch.from_numpy(self.map.array)
        with _readers_lock:
            _readers[self.map] = _Reader(path, self.map)

    def tensor(self, start: int, size: int, dtype: torch.dtype) -> Tensor:
        """The bytes [start, start + size) as [n] of `dtype`; copied only where they are not aligned to it."""
        data = self.bytes[start : start + size]
        return (data.clone() if start % dtype.itemsize else data).view(dtype)


class _Mapping:
    """The mapped pages of a file; unlike mmap.mmap it keeps no descriptor open. `mapping[a:b]` copies bytes."""

    def __init__(self, path: Path, size: int) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            address = _libc.mmap(None, size, protection, mmap.MAP_PRIVATE, fd, 0)
        finally:
            number = ctypes.get_errno()
            os.close(fd)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(number, os.strerror(number), str(path))
        weakref.finalize(self, _libc.munmap, address, size).atexit = False
        _libc.madvise(address, size, mmap.MADV_RANDOM)  # only small values are read in place; the rest is loaded
        self.address, self.size, self.file_id = address, size, (status.st_dev, status.st_ino)
        # numpy finds the memory by this; an array of it keeps this object alive.
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}

    @property
    def array(self) -> Any:
        """The whole file, [size] uint8."""
        return np.asarray(self)

    def __getitem__(self, place: slice) -> bytes:
        return bytes(self.array[place].data)


class _Descriptors:
    """The descriptors of a file: one reads through the page cache, one with O_DIRECT."""

    def __init__(self, path: Path, file_id: tuple[int, int]) -> None:
        self.cached = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.cached).atexit = False
        status = os.fstat(self.cached)
        if (status.st_dev, status.st_ino) != file_id:
            raise OSError(errno.ESTALE, "the file was replaced by another while it was read", str(path))
        self.direct = open_direct(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.direct).atexit = False


class _Reader:
    """Reads from a mapped file, which it finds by the address of its pages."""

    def __init__(self, path: Path, mapping: _Mapping) -> None:
        self.path, self.address, self.size, self._file_id = path, mapping.address, mapping.size, mapping.file_id

    def _descriptors(self) -> _Descriptors:
        """The file's descriptors; those of the least recently read files are closed once no read uses them."""
        with _open_lock:
            descriptors = _open_files.pop(self, None) or _Descriptors(self.path, self._file_id)
            _open_files[self] = descriptors
            while len(_open_files) > MAX_OPEN_FILES:
                del _open_files[next(iter(_open_files.keys()))]
        return descriptors

    def read(self, start: int, size: int) -> Tensor:
        """The bytes [start, start + size), [size] uint8; raises OSError when they cannot be read."""
        first = start - start % SECTOR
        done, end = 0, start + size - first
        array, descriptors = aligned_buffer(end), self._descriptors()
        fd = descriptors.cached if self._in_cache(first, start + size) else descriptors.direct
        if not is_direct(fd):
            os.posix_fadvise(fd, first, end, os.POSIX_FADV_WILLNEED)
        while done < end:
            try:
                count = os.preadv(fd, [array[done : round_up(end)].data], first + done)
            except OSError as error:
                if not disable_direct(fd, error):
                    raise
                continue
            if not count:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            done += count
        return torch.from_numpy(array)[start - first : end]

    def _in_cache(self, start: int, end: int) -> bool:
        """Whether most of these bytes are in the page cache, where reading them is faster."""
        num_pages = -(-end // mmap.PAGESIZE) - start // mmap.PAGESIZE
        resident = ctypes.create_string_buffer(num_pages)
        address = ctypes.c_void_p(self.address + start - start % mmap.PAGESIZE)
        found = _libc.mincore(address, ctypes.c_size_t(end - start), resident) == 0
        return found and 2 * resident.raw.count(1) > num_pages


_readers: "weakref.WeakKeyDictionary[_Mapping, _Reader]" = weakref.WeakKeyDictionary()
_readers_lock = threading.Lock()  # a resumed run maps and loads in several threads
_open_files: "weakref.WeakKeyDictionary[_Reader, _Descriptors]" = weakref.WeakKeyDictionary()  # most recent last
_open_lock = threading.Lock()


def load(tensor: Tensor) -> Tensor:
    """`tensor` in memory: if it lies in a mapped file, one read fetches the span from its first to its last element."""
    if not tensor.numel():
        return tensor
    numel = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.data_ptr(), numel * tensor.element_size()
    with _readers_lock:
        readers = list(_readers.values())
    for reader in readers:
        if reader.address <= start and start + size <= reader.address + reader.size:
            data = reader.read(start - reader.address, size).view(tensor.dtype)
            return data.as_strided(tensor.shape, tensor.stride(), data.storage_offset())
    return tensor
