"""Direct I/O (O_DIRECT): files read and written past the page cache, in blocks, with page-aligned buffers.

Copying gigabytes through the page cache costs more CPU time than the conversion itself, and page faults cost more
still. So blocks move between the disk and a few reused buffers with O_DIRECT. Where the file system does not support
it, they go through the page cache, and written data is flushed early.
"""

import errno
import fcntl
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
BLOCK_BYTES = 8 << 20
SECTOR = 4096  # O_DIRECT needs offsets, lengths and memory addresses that are multiples of it
PREFETCH_BLOCKS = 3
_END: Any = object()
_free_buffers: list[mmap.mmap] = []  # each holds one block


def prefetch(items: Iterable[T], depth: int = PREFETCH_BLOCKS) -> Iterator[T]:
    """`items`, in order; a thread produces up to `depth` of them while the caller works on one."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as producer:
        pending = deque(producer.submit(next, iterator, _END) for _ in range(depth))
        while (item := pending.popleft().result()) is not _END:
            pending.append(producer.submit(next, iterator, _END))
            yield item
            del item  # so that its buffer can be reused


def aligned_buffer(size: int) -> Any:
    """An array of at least `size` bytes, [n] uint8, aligned to SECTOR; buffers of one block are reused."""
    if size > BLOCK_BYTES + 2 * SECTOR:
        return np.frombuffer(_allocate(size), np.uint8)
    try:
        memory = _free_buffers.pop()
    except IndexError:
        memory = _allocate(BLOCK_BYTES + 2 * SECTOR)
    array = np.frombuffer(memory, np.uint8)
    weakref.finalize(array, _free_buffers.append, memory).atexit = False
    return array


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor in a reusable buffer."""
    numel = torch.Size(shape).numel()
    return torch.from_numpy(aligned_buffer(numel * dtype.itemsize))[: numel * dtype.itemsize].view(dtype).reshape(shape)


def _allocate(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, round_up(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def round_up(size: int) -> int:
    """`size`, rounded up to a multiple of SECTOR."""
    return -(-size // SECTOR) * SECTOR


def open_direct(path: Path, flags: int) -> int:
    """A file descriptor with O_DIRECT where the file system supports it."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def is_direct(fd: int) -> bool:
    """Whether `fd` was opened with O_DIRECT."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def disable_direct(fd: int, error: OSError) -> bool:
    """Whether `error` means that the file system needs another alignment; if so, `fd` now uses the page cache."""
    if error.errno != errno.EINVAL or not is_direct(fd):
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return True
