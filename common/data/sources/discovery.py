"""The files that INPUT names: each regular, readable and not empty; what a folder holds beside them is told."""

import glob
import os
import shlex
import stat
from collections import Counter
from pathlib import Path

from common.data.sources.files import ENDINGS, KINDS_OF_FILES
from common.errors import KitError, reading
from common.log import logger

NAMES_TOLD = 3


def find_inputs(text: str) -> list[Path]:
    """The files that INPUT names, in its order: a path as it stands, or words of paths, globs and folders.

    Of a folder those that end as rows do, hidden ones left out; what else lies in it is told in the log, as is a file
    that is named more than once. Raises KitError when a word names nothing, or a file is empty or cannot be read.
    """
    if _exists(text):
        words = [text]
    else:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise KitError(f"INPUT={text}: {error}: quote paths that hold spaces, or escape the quote") from error
    files = [file for word in words for file in _files_of(word)]
    if not files:
        raise KitError(f"INPUT is empty: give a file ({KINDS_OF_FILES}), a folder or a glob of them")
    _tell_repeated(files, [_identity(file) for file in files])
    return files


def _exists(text: str) -> bool:
    # Not Path.exists, for which "" is "." and a list of many words a name too long.
    return os.path.exists(text)  # noqa: PTH110


def _files_of(word: str) -> list[Path]:
    if _exists(word):
        return _inside(Path(word)) if Path(word).is_dir() else [Path(word)]
    # glob.glob, not Path.glob: the pattern may be absolute.
    found = [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
    if "**" in word:  # the files of the folders that it names are named by it too
        found = [path for path in found if not path.is_dir()]
    if not found:
        raise KitError(f"INPUT: {word} does not exist: give a file ({KINDS_OF_FILES}), a folder or a glob of them")
    return [file for path in found for file in (_inside(path) if path.is_dir() else [path])]


def _inside(folder: Path) -> list[Path]:
    """The files of rows in `folder`, by name."""
    files: list[Path] = []
    others: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                others.setdefault("hidden", []).append(entry.name)
            elif entry.is_dir():
                others.setdefault("folders", []).append(entry.name)
            elif entry.name.lower().endswith(ENDINGS):
                files.append(folder / entry.name)
            else:
                others.setdefault(Path(entry.name).suffix or "without an ending", []).append(entry.name)
    told = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in others.items())
    if not files:
        raise KitError(
            f"INPUT: the folder {folder} holds no {' or '.join(ENDINGS)} file{told and f', but {told}'}:"
            " name the files, or a glob of them"
        )
    if told:
        logger.info("INPUT: in the folder %s these are not read: %s; name what is rows, or a glob of it", folder, told)
    return files


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_TOLD]) + (", ..." if len(names) > NAMES_TOLD else "")


def _identity(path: Path) -> tuple[int, int]:
    """(device, inode) of `path`; raises KitError unless rows may be read from it."""
    with reading(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise KitError(f"INPUT: {path} is no regular file: give a file ({KINDS_OF_FILES}), a folder or a glob")
        if not found.st_size:  # a file of /proc is none, and may not be readable: the others are opened soon
            with path.open("rb", buffering=0) as stream:
                if not stream.read(1):
                    raise KitError(f"{path} is empty: remove it from INPUT, or write its rows again")
    return found.st_dev, found.st_ino


def _tell_repeated(files: list[Path], identities: list[tuple[int, int]]) -> None:
    times = Counter(identities)
    repeated = {identity: str(file) for file, identity in zip(files, identities, strict=True) if times[identity] > 1}
    if repeated:
        logger.warning(
            "INPUT names %d file%s more than once, by one path or several: %s; its rows are read each time",
            len(repeated), "s" if len(repeated) > 1 else "", _some(list(repeated.values())),
        )  # fmt: skip
