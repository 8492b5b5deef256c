"""Atomic output: everything is written to `.unfinished` inside the output folder, then moved to its final place.

`.unfinished.json` marks an unfinished folder, and lists the files before they are moved. Files that it does not list
were not written here, and are never removed.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.checkpoint.formats.checkpoint_paths import TRACKER
from common.checkpoint.formats.model_files import REPORT
from common.errors import KitError, writing
from common.files import sync, write_atomically
from common.folders import check_writable, free_bytes
from common.locks import lock

UNFINISHED, MARK = ".unfinished", ".unfinished.json"
# The files that identify the format of a folder: moved after all others, in this order.
LAST = ("config.json", TRACKER)
Identity = list[int]  # inode, size and mtime of a file, which a rename keeps


def check_output_folder(folder: Path, source: Path) -> None:
    """Raises KitError unless `folder` is writable, and new, empty, or left unfinished by a killed run."""
    if folder.resolve() == source.resolve():
        raise KitError(f"SAVE_CHECKPOINT_PATH={folder} is the input folder: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise KitError(f"SAVE_CHECKPOINT_PATH={folder} is a file: choose a folder")
    if folder.is_dir():
        _check_empty(folder)
    check_writable(folder, f"SAVE_CHECKPOINT_PATH={folder}")


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raises KitError unless `folder` has `num_bytes` of free disk space once the files of a killed run are removed."""
    left = _remains(folder) if folder.is_dir() else []
    free = free_bytes(folder) + sum(map(_bytes_of, left))
    if free < num_bytes:
        with writing(folder):
            raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB are free, and {num_bytes / 1e9:.2f} GB are needed")


def _bytes_of(path: Path) -> int:
    return sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file())


def _check_empty(folder: Path) -> None:
    # A failed verification leaves its report there.
    if foreign := sorted(set(folder.iterdir()) - {*_remains(folder), folder / REPORT}):
        raise KitError(
            f"SAVE_CHECKPOINT_PATH={folder} is not empty, it holds {foreign[0].name}:"
            " choose another folder, or remove what is in it"
        )


def write_folder_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with an empty folder, syncs what it wrote and moves it to `folder`.

    When `write` fails, what it wrote is removed. Raises KitError when the disk refuses or another run writes there.
    """
    unfinished = folder / UNFINISHED
    with writing(folder):
        _make(folder)
        with _locked(folder):
            _check_empty(folder)
            _remove(_remains(folder))
            try:
                _write_mark(folder, {})
                unfinished.mkdir()
                write(unfinished)
                sync_tree(unfinished)
                files = [path for path in unfinished.rglob("*") if path.is_file()]
                _write_mark(folder, {str(path.relative_to(unfinished)): _identity(path) for path in files})
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                for name in (MARK + ".partial", MARK):
                    (folder / name).unlink(missing_ok=True)
                raise
            _publish(unfinished, folder)


def _make(folder: Path) -> None:
    """Creates `folder` and its parents, and syncs them, so that they survive a power failure."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks `folder` against other conversions; the lock is released when the process ends, even if it is killed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(handle, folder, fcntl.flock)
        except BlockingIOError as error:
            raise KitError(
                f"SAVE_CHECKPOINT_PATH={folder} is being written by another conversion: wait for it, or choose another"
            ) from error
        yield
    finally:
        os.close(handle)


def _write_mark(folder: Path, published: dict[str, Identity]) -> None:
    write_atomically(folder / MARK, json.dumps({"published": published}).encode())


def _read_mark(folder: Path) -> dict[str, Identity]:
    """The files that were about to be moved and their identities; empty where that cannot be read."""
    try:
        published: Any = json.loads((folder / MARK).read_bytes())["published"]
        return {str(name): list(identity) for name, identity in published.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _remains(folder: Path) -> list[Path]:
    """What a killed run left, in the order of removal: identifying files first, the mark last."""
    partial = folder / (MARK + ".partial")
    if not (folder / MARK).is_file():
        return [partial] if partial.is_file() else []
    published = _read_mark(folder)
    names = {Path(name).parts[0] for name in published}
    tops = [name for name in reversed(LAST) if name in names] + sorted(names - set(LAST))
    ours = [folder / name for name in tops if (folder / name).exists() and _is_ours(folder / name, folder, published)]
    marks = [folder / UNFINISHED, partial, folder / MARK]
    return [*ours, *(path for path in marks if path.exists())]


def _is_ours(path: Path, folder: Path, published: dict[str, Identity]) -> bool:
    """Whether `path` is, or contains only, files that the killed run wrote."""
    files = [path] if not path.is_dir() else [each for each in path.rglob("*") if not each.is_dir()]
    return all(published.get(str(each.relative_to(folder))) == _identity(each) for each in files)


def _identity(path: Path) -> Identity:
    status = path.lstat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_tree(folder: Path) -> None:
    """Syncs everything in `folder`."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def _publish(unfinished: Path, folder: Path) -> None:
    names = sorted(path.name for path in unfinished.iterdir())
    for name in [name for name in names if name not in LAST]:
        (unfinished / name).replace(folder / name)
    sync(folder)
    for name in [name for name in LAST if name in names]:
        (unfinished / name).replace(folder / name)
        sync(folder)
    unfinished.rmdir()
    (folder / MARK).unlink()  # last: a run killed before this can be repeated with the same command
