"""A folder that is written as a whole: everything lies in `.unfinished` inside it until all of it is there."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.checkpoint.layout import RELEASE, TRACKER, model_files
from common.errors import KitError
from common.locks import lock

UNFINISHED = ".unfinished"
REPORT = "conversion_report.json"
# Those by which a folder is known: they get their final place after all others, in this order.
LAST = ("config.json", TRACKER)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", RELEASE, REPORT)


def check_target(folder: Path, source: Path) -> None:
    """Raises KitError unless `folder` is new, empty, or left unfinished by a run that was killed."""
    if folder.resolve() == source.resolve():
        raise KitError(f"SAVE_CHECKPOINT_PATH={folder} is the folder that is read: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise KitError(f"SAVE_CHECKPOINT_PATH={folder} is a file: choose a folder")
    if folder.is_dir():
        _check_empty(folder)


def _check_empty(folder: Path) -> None:
    # A report may lie there alone: of a proof that failed.
    if foreign := sorted(set(folder.iterdir()) - {*_remains(folder), folder / REPORT}):
        raise KitError(
            f"SAVE_CHECKPOINT_PATH={folder} is not empty, it holds {foreign[0].name}:"
            " choose another folder, or remove what is in it"
        )


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with an empty folder and gives what it wrote its final place in `folder`.

    When `write` fails, what it wrote is removed. Raises KitError when the disk refuses or another run writes there.
    """
    unfinished = folder / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _check_empty(folder)
            for path in _remains(folder):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            unfinished.mkdir()
            try:
                write(unfinished)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            _publish(unfinished, folder)
    except OSError as error:
        raise KitError(f"{folder} cannot be written: {error}: mend it and run the same command again") from error


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


def _remains(folder: Path) -> list[Path]:
    """What a killed run left: that by which `folder` would be known is the first, the mark of the kill the last."""
    if not (folder / UNFINISHED).is_dir():
        return []
    known = [folder / name for name in reversed(LAST) if (folder / name).exists()]
    others = [*model_files(folder), *(path for pattern in WEIGHTS for path in folder.glob(pattern))]
    return [*known, *(path for path in others if path not in known), folder / UNFINISHED]


def _publish(unfinished: Path, folder: Path) -> None:
    names = sorted(path.name for path in unfinished.iterdir())
    for name in [name for name in names if name not in LAST] + [name for name in LAST if name in names]:
        (unfinished / name).replace(folder / name)
    unfinished.rmdir()
