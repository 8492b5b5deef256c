"""A folder that is written as a whole: everything lies in `.unfinished` inside it until all of it is there.

`.unfinished.json` says that the folder is being written, and before anything gets its final place, which files those
are. What it does not name was not written here, and is never removed.
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

from common.atomic_file import sync
from common.checkpoint.formats.layout import TRACKER
from common.checkpoint.formats.model_files import REPORT
from common.errors import KitError, writing
from common.folders import check_writable, free_bytes
from common.locks import lock

UNFINISHED, MARK = ".unfinished", ".unfinished.json"
# Those by which a folder is known: they get their final place after all others, in this order.
LAST = ("config.json", TRACKER)
Identity = list[int]  # inode, bytes and time of a file, that a rename does not change


def check_target(folder: Path, source: Path) -> None:
    """Raises KitError unless `folder` can be written, and is new, empty, or what a run left that was killed."""
    if folder.resolve() == source.resolve():
        raise KitError(f"SAVE_CHECKPOINT_PATH={folder} is the folder that is read: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise KitError(f"SAVE_CHECKPOINT_PATH={folder} is a file: choose a folder")
    if folder.is_dir():
        _check_empty(folder)
    check_writable(folder, f"SAVE_CHECKPOINT_PATH={folder}")


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises KitError unless the disk of `folder` has room for `num_bytes`, what is left of a killed run being gone."""
    left = _remains(folder) if folder.is_dir() else []
    free = free_bytes(folder) + sum(map(_bytes_of, left))
    if free < num_bytes:
        with writing(folder):
            raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB are free, and {num_bytes / 1e9:.2f} GB are needed")


def _bytes_of(path: Path) -> int:
    return sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file())


def _check_empty(folder: Path) -> None:
    # A report may lie there alone: of a proof that failed.
    if foreign := sorted(set(folder.iterdir()) - {*_remains(folder), folder / REPORT}):
        raise KitError(
            f"SAVE_CHECKPOINT_PATH={folder} is not empty, it holds {foreign[0].name}:"
            " choose another folder, or remove what is in it"
        )


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with an empty folder and gives what it wrote its final place in `folder`, all on the disk.

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
    """Makes `folder` and those above it, so that their names outlast a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other conversions out of `folder`; the system lets it go when the process ends, however it does."""
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
    partial = folder / (MARK + ".partial")
    partial.write_text(json.dumps({"published": published}), encoding="utf-8")
    sync(partial)
    partial.replace(folder / MARK)
    sync(folder)


def _read_mark(folder: Path) -> dict[str, Identity]:
    """What was to get its final place: the files and what they are known by; nothing where that cannot be told."""
    try:
        published: Any = json.loads((folder / MARK).read_bytes())["published"]
        return {str(name): list(identity) for name, identity in published.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _remains(folder: Path) -> list[Path]:
    """What a killed run left: that by which `folder` would be known is the first, the mark of the kill the last."""
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
    """Whether it is, or holds nothing but, files that the killed run wrote."""
    files = [path] if not path.is_dir() else [each for each in path.rglob("*") if not each.is_dir()]
    return all(published.get(str(each.relative_to(folder))) == _identity(each) for each in files)


def _identity(path: Path) -> Identity:
    told = path.lstat()
    return [told.st_ino, told.st_size, told.st_mtime_ns]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_tree(folder: Path) -> None:
    """Makes all that lies in `folder` last through a power cut."""
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
    (folder / MARK).unlink()  # the last step: whoever is ended before it has the same command to repeat
