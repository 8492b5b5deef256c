"""checksums.json of a torch_dist checkpoint: the size and CRC-32 of each file. Older checkpoints have none."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.direct_io import BLOCK_BYTES, prefetch
from common.checkpoint.io.mapped_file import MappedFile, load
from common.errors import KitError
from common.json_file import read_json, shown

CHECKSUMS = "checksums.json"
SMALL_FILES = (".metadata", "common.pt", "metadata.json")
REMEDY = "copy the checkpoint again, or resume from an older one; if it was changed on purpose, remove checksums.json"

Checksums = dict[str, dict[str, int]]  # file name -> {"bytes": size, "crc32": checksum}


def check_file_name(path: Path, name: str) -> None:
    """Raises KitError unless `name`, which the file `path` contains, names a file in the same folder."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise KitError(f"{path} names {name!r}, which is not in its folder: copy it again from its source")


def read_checksums(folder: Path) -> Checksums:
    """The content of checksums.json; empty without one. Raises KitError where it is damaged."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    checksums = read_json(path, REMEDY)
    for name, entry in checksums.items():
        valid = isinstance(entry, dict) and all(type(entry.get(key)) is int for key in ("bytes", "crc32"))
        if not valid:
            raise KitError(f"{path} is damaged (invalid entry for {shown(name)}: {shown(entry)}): {REMEDY}")
        check_file_name(path, name)
    return checksums


def check_size(path: Path, size: int, checksums: Checksums) -> None:
    """Raises KitError unless `size`, the size of the file at `path`, is the one in checksums.json."""
    if path.name in checksums and checksums[path.name]["bytes"] != size:
        raise KitError(f"{path} has {size} bytes, expected {checksums[path.name]['bytes']}: {REMEDY}")


def check_small_files(folder: Path, checksums: Checksums) -> None:
    """Raises KitError unless the SMALL_FILES that `checksums` contains match it."""
    for path in (folder / name for name in SMALL_FILES if name in checksums):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise KitError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
        check_size(path, len(content), checksums)
        _check_crc32(path, crc32(content), checksums)


def check_all_files(folder: Path, on_bytes: Callable[[int], None] = lambda size: None) -> int:
    """The number of files that match checksums.json, 0 without one; raises KitError for the first mismatch.

    `on_bytes` is called with the size of each file once it is checked.
    """
    checksums = read_checksums(folder)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for size in pool.map(lambda name: _check_file(folder / name, checksums), checksums):
            on_bytes(size)
    return len(checksums)


def _check_file(path: Path, checksums: Checksums) -> int:
    if not path.is_file():
        raise KitError(f"{path} is missing: {REMEDY}")
    check_size(path, path.stat().st_size, checksums)
    data, checksum = MappedFile(path).bytes, 0
    for part in prefetch(load(part) for part in data.split(BLOCK_BYTES)):
        checksum = crc32(part.numpy().data, checksum)
    _check_crc32(path, checksum, checksums)
    return data.numel()


def _check_crc32(path: Path, found: int, checksums: Checksums) -> None:
    expected = checksums[path.name]["crc32"]
    if found != expected:
        raise KitError(f"{path} is damaged: its CRC-32 is {found:08x}, expected {expected:08x}: {REMEDY}")
