"""Hashes of files by blocks, so that a part can hash its own span without reading the rest of the file.

A file's hash is the sha256 of the concatenated sha256 of its blocks of BLOCK_BYTES. It does not depend on how the file
was split into parts.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4 << 20
READ_BYTES = 1 << 20
HASHED = "sha256:"
SAMPLE_BYTES, DATA_SAMPLES = 4096, 256


def hash_bytes(path: Path, start: int, end: int) -> str:
    """sha256 of the bytes [start, end) of `path`."""
    digest, left = hashlib.sha256(), end - start
    buffer = bytearray(min(left, READ_BYTES))
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (read := stream.readinto(memoryview(buffer)[: min(left, READ_BYTES)])):
            digest.update(memoryview(buffer)[:read])
            left -= read
    return digest.hexdigest()


def hash_of_blocks(blocks: Iterable[str]) -> str:
    """The hash of a file from those of its blocks."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, blocks))).hexdigest()


def hash_file(path: Path) -> str:
    """The hash of all of `path`."""
    size = path.stat().st_size
    blocks = (hash_bytes(path, at, min(at + BLOCK_BYTES, size)) for at in range(0, size, BLOCK_BYTES))
    return f"{HASHED}{hash_of_blocks(blocks)}"


def hash_samples(path: Path, num_samples: int) -> str:
    """The hash of the size of `path` and of `num_samples` pieces of 4 KiB spread evenly over it, including its end.

    Tells files of terabytes apart at once, but misses a change that affects neither the size nor a sample.
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


class SpanHash:
    """Hashes of the bytes [start, end) of a file of `file_bytes`, computed by `pool` in the background.

    result(): a dict of "head", the bytes before the first block that starts in the span; "blocks", each block that
    starts in the span, the last of which may end after it; "tail", the bytes of that last block inside the span. Empty
    heads and tails are omitted. The blocks of all spans of a file, in order, are those of the file.
    """

    def __init__(self, pool: Executor, path: Path, start: int, end: int, file_bytes: int) -> None:
        self._pool, self._path = pool, path
        first = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        pieces = [("head", start, min(first, end))] if start < min(first, end) else []
        for at in range(first, end, BLOCK_BYTES):
            block_end = min(at + BLOCK_BYTES, file_bytes)
            pieces.append(("blocks", at, block_end))
            if block_end > end:
                pieces.append(("tail", at, end))
        self._pending, self._requested = pieces[::-1], list[tuple[str, Future[str]]]()
        self._known: str | None = None
        self._is_one_block = start == 0 and end == file_bytes <= BLOCK_BYTES

    def request(self, until: int | None = None) -> None:
        """Starts hashing the blocks that begin before byte `until`, or all, while they are in the page cache."""
        while self._pending and not self._known and (until is None or self._pending[-1][1] < until):
            kind, start, end = self._pending.pop()
            self._requested.append((kind, self._pool.submit(hash_bytes, self._path, start, end)))

    def set_known(self, sha256: str | None) -> None:
        """Sets the hash of a file that was read whole by the caller."""
        if self._is_one_block:
            self._known = sha256

    def result(self) -> dict[str, Any]:
        """All hashes; waits for them."""
        if self._known:
            return {"blocks": [self._known]}
        self.request()
        found: dict[str, Any] = {"blocks": [future.result() for kind, future in self._requested if kind == "blocks"]}
        return {**found, **{kind: future.result() for kind, future in self._requested if kind != "blocks"}}
