"""checksums.json of a torch_dist checkpoint: of each file its size and CRC-32. Older checkpoints have none."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.disk import BLOCK_BYTES, DiskFile, ahead, load
from common.errors import KitError
from common.json_file import read_json, shown

CHECKSUMS = "checksums.json"
SMALL_FILES = (".metadata", "common.pt", "metadata.json")
REMEDY = "copy the checkpoint again, or go on from the one before; if it was changed on purpose, remove checksums.json"

Facts = dict[str, dict[str, int]]  # name -> {"bytes": size, "crc32": checksum}


def check_inside(path: Path, name: str) -> None:
    """Raises KitError unless `name`, that the file `path` tells, is that of a file in its own folder."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise KitError(f"{path} names {name!r}, which is not in its folder: copy it again from where it came")


def read_facts(folder: Path) -> Facts:
    """What `folder` tells of its files; nothing where it tells nothing. Raises KitError where that is damaged."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    told = read_json(path, REMEDY)
    for name, facts in told.items():
        sound = isinstance(facts, dict) and all(type(facts.get(key)) is int for key in ("bytes", "crc32"))
        if not sound:
            raise KitError(f"{path} is damaged (of {shown(name)} it tells {shown(facts)}): {REMEDY}")
        check_inside(path, name)
    return told


def check_size(path: Path, size: int, facts: Facts) -> None:
    """Raises KitError unless the file at `path`, of `size` bytes, is as long as when it was written."""
    if path.name in facts and facts[path.name]["bytes"] != size:
        raise KitError(f"{path} has {size} bytes, and was written with {facts[path.name]['bytes']}: {REMEDY}")


def check_small_files(folder: Path, facts: Facts) -> None:
    """Raises KitError unless those of SMALL_FILES that `facts` tells of are as they were written."""
    for path in (folder / name for name in SMALL_FILES if name in facts):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise KitError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
        check_size(path, len(content), facts)
        _compare(path, crc32(content), facts)


def check_all_files(folder: Path, done: Callable[[int], None] = lambda size: None) -> int:
    """The number of files that were read and found as they were written; raises KitError for the first that is not.

    `done` is told bytes as they go. 0 where the checkpoint has no checksums.
    """
    facts = read_facts(folder)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for size in pool.map(lambda name: _check_file(folder / name, facts), facts):
            done(size)
    return len(facts)


def _check_file(path: Path, facts: Facts) -> int:
    if not path.is_file():
        raise KitError(f"{path} is missing: {REMEDY}")
    check_size(path, path.stat().st_size, facts)
    data, checksum = DiskFile(path).bytes, 0
    for part in ahead(load(part) for part in data.split(BLOCK_BYTES)):
        checksum = crc32(part.numpy().data, checksum)
    _compare(path, checksum, facts)
    return data.numel()


def _compare(path: Path, found: int, facts: Facts) -> None:
    expected = facts[path.name]["crc32"]
    if found != expected:
        raise KitError(f"{path} is damaged: its CRC-32 is {found:08x}, and was {expected:08x} when written: {REMEDY}")
