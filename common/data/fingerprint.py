"""Hashes of the inputs by blocks, so that a part of the work knows its own share without reading the rest.

A file's hash is the sha256 of its blocks' sha256 back to back; every block has BLOCK_BYTES but the last.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 64 << 20
READ_BYTES = 1 << 20
HASHED = "sha256:"
SAMPLE_BYTES, DATA_SAMPLES = 4096, 256


def hash_block(path: Path, number: int) -> str:
    """sha256 of block `number` of `path`."""
    digest, left = hashlib.sha256(), BLOCK_BYTES
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as stream:
        stream.seek(number * BLOCK_BYTES)
        while left and (read := stream.readinto(memoryview(buffer)[: min(left, READ_BYTES)])):
            digest.update(memoryview(buffer)[:read])
            left -= read
    return digest.hexdigest()


def hash_of_blocks(blocks: Mapping[int, str], size: int) -> str | None:
    """A file's hash from those of its blocks, None while one of them is missing."""
    numbers = range(-(-size // BLOCK_BYTES))
    if any(number not in blocks for number in numbers):
        return None
    return hashlib.sha256(b"".join(bytes.fromhex(blocks[number]) for number in numbers)).hexdigest()


def hash_file(path: Path) -> str:
    """The hash of all of `path`."""
    size = path.stat().st_size
    blocks = {number: hash_block(path, number) for number in range(-(-size // BLOCK_BYTES))}
    return f"{HASHED}{hash_of_blocks(blocks, size)}"


def hash_samples(path: Path, num_samples: int) -> str:
    """The hash of the size of `path` and of `num_samples` parts of 4 KiB spread evenly over it, the last one included.

    Files of terabytes are told apart in a moment; a change that leaves size and samples as they are is not seen.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= num_samples * SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for number in range(num_samples):
                stream.seek((size - SAMPLE_BYTES) * number // (num_samples - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return f"{HASHED}{digest.hexdigest()}"


class Fingerprints:
    """The hashes of the blocks of files, each made once, on threads beside the caller's work."""

    def __init__(self, files: list[Path], threads: int) -> None:
        self.files, self._threads = files, threads
        self._pool: ThreadPoolExecutor | None = None
        self._blocks: dict[tuple[int, int], Future[str]] = {}

    def request(self, file: int, start: int, end: int) -> None:
        """Has the blocks that hold the bytes [start, end) of file number `file` hashed, soon."""
        # Not before the first request: threads must not be there yet when the workers are forked.
        self._pool = self._pool or ThreadPoolExecutor(self._threads, "hash")
        for number in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if (file, number) not in self._blocks:
                self._blocks[file, number] = self._pool.submit(hash_block, self.files[file], number)

    def blocks(self, file: int, start: int, end: int) -> dict[int, str]:
        """Number to hash of the blocks that hold the bytes [start, end) of file number `file`; waits for them."""
        self.request(file, start, end)
        numbers = range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        return {number: self._blocks[file, number].result() for number in numbers}

    def whole(self, file: int, size: int) -> str:
        """The hash of file number `file`, which has `size` bytes; waits for it."""
        found = hash_of_blocks(self.blocks(file, 0, size), size)
        assert found
        return found
