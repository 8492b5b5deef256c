"""A file written sequentially with direct I/O, its CRC-32 computed on the way."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.direct_io import BLOCK_BYTES, aligned_buffer, disable_direct, is_direct, open_direct, round_up

MAX_PENDING_BLOCKS = 3


class FileWriter:
    """A new file, written from start to end; a thread writes full blocks while the caller fills the next one.

    checksum: a second thread computes the CRC-32; `checksums` holds it, and the size, once the file is closed.
    """

    def __init__(self, path: Path, *, checksum: bool = False) -> None:
        self._fd = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._write_thread = ThreadPoolExecutor(1)
        self._checksum_thread = ThreadPoolExecutor(1) if checksum else None
        self._crc32 = 0
        self._block = aligned_buffer(BLOCK_BYTES)
        self._free = [aligned_buffer(BLOCK_BYTES) for _ in range(MAX_PENDING_BLOCKS)]
        self._start, self._filled = 0, 0  # of the current block: its offset in the file, and the bytes in it
        self._pending: deque[tuple[Any, list[Future[None]]]] = deque()  # blocks being written, oldest first

    @property
    def checksums(self) -> dict[str, int]:
        """The file's "bytes" and "crc32"."""
        return {"bytes": self._start, "crc32": self._crc32}

    def write(self, data: Any) -> int:
        """The number of bytes in `data`, all of which are accepted; raises OSError when an earlier write failed."""
        rest = np.frombuffer(data, np.uint8)
        size = rest.size
        while rest.size:
            part = rest[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + part.size] = part
            self._filled += part.size
            rest = rest[part.size :]
            if self._filled == BLOCK_BYTES:
                self._submit_block()
        return size

    def _submit_block(self) -> None:
        tasks = [self._write_thread.submit(self._write_block, self._block, self._filled, self._start)]
        if self._checksum_thread:
            tasks.append(self._checksum_thread.submit(self._update_crc32, self._block, self._filled))
        self._pending.append((self._block, tasks))
        self._start += self._filled
        if not self._free:
            self._wait_for_oldest()
        self._block, self._filled = self._free.pop(), 0

    def _wait_for_oldest(self) -> None:
        """Waits until the oldest pending block is written; raises what went wrong."""
        block, tasks = self._pending.popleft()
        for task in tasks:
            task.result()
        self._free.append(block)

    def _update_crc32(self, block: Any, size: int) -> None:
        self._crc32 = crc32(block[:size].data, self._crc32)

    def _write_block(self, block: Any, size: int, start: int) -> None:
        """Writes `size` bytes at `start`, padded to a whole sector; `close` truncates the padding."""
        done, end = 0, round_up(size)
        block[size:end] = 0
        while done < end:
            try:
                done += os.pwrite(self._fd, block[done:end].data, start + done)
            except OSError as error:
                if not disable_direct(self._fd, error):
                    raise
        if not is_direct(self._fd) and hasattr(os, "posix_fadvise"):
            # For dirty pages this starts writeback and drops nothing.
            os.posix_fadvise(self._fd, start, end, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Waits until the whole file is on the disk; raises OSError when it cannot be written."""
        if self._filled:
            self._submit_block()
        while self._pending:
            self._wait_for_oldest()
        os.ftruncate(self._fd, self._start)
        os.fsync(self._fd)

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._write_thread.shutdown()
            if self._checksum_thread:
                self._checksum_thread.shutdown()
            os.close(self._fd)
