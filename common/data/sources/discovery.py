"""Which files INPUT names: each must be a regular, readable, non-empty file."""

import glob
import os
import shlex
import stat
from collections import Counter
from pathlib import Path

from common.data.sources.file_format import ENDINGS, KINDS_OF_FILES
from common.errors import KitError, reading
from common.log import logger

MAX_NAMES_SHOWN = 3


def find_inputs(text: str) -> list[Path]:
    """The files that INPUT names, in order: one path, or several paths, globs and folders separated by spaces.

    From a folder only jsonl files are taken, and never hidden ones; skipped entries and files named twice are logged.
    Raises KitError when a path matches nothing, or when a file is empty or cannot be read.
    """
    if exists(text):
        words = [text]
    else:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise KitError(f"INPUT={text}: {error}: quote paths that hold spaces, or escape the quote") from error
    files = [file for word in words for file in _expand(word)]
    if not files:
        raise KitError(f"INPUT is empty: give a file ({KINDS_OF_FILES}), a folder or a glob of them")
    _warn_repeated(files, [_identity(file) for file in files])
    return files


def exists(text: str) -> bool:
    """Whether `text` is a path of something that exists."""
    # Not Path.exists: Path("") is ".", and a long list of paths raises "file name too long".
    return os.path.exists(text)  # noqa: PTH110


def _expand(word: str) -> list[Path]:
    """The files that one path, glob or folder stands for."""
    if exists(word):
        return _list_folder(Path(word)) if Path(word).is_dir() else [Path(word)]
    # glob.glob, not Path.glob: the pattern may be absolute.
    found = [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
    if "**" in word:  # matches the files inside the matched folders as well
        found = [path for path in found if not path.is_dir()]
    if not found:
        raise KitError(f"INPUT: {word} does not exist: give a file ({KINDS_OF_FILES}), a folder or a glob of them")
    return [file for path in found for file in (_list_folder(path) if path.is_dir() else [path])]


def _list_folder(folder: Path) -> list[Path]:
    """The jsonl files in `folder`, sorted by name; logs what it skips."""
    files: list[Path] = []
    skipped: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                skipped.setdefault("hidden", []).append(entry.name)
            elif entry.is_dir():
                skipped.setdefault("folders", []).append(entry.name)
            elif entry.name.lower().endswith(ENDINGS):
                files.append(folder / entry.name)
            else:
                skipped.setdefault(Path(entry.name).suffix or "without an extension", []).append(entry.name)
    summary = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in skipped.items())
    if not files:
        raise KitError(
            f"INPUT: the folder {folder} holds no {' or '.join(ENDINGS)} file{summary and f', but {summary}'}:"
            " name the files, or a glob of them"
        )
    if summary:
        logger.info("INPUT: skipped in the folder %s: %s; name a file or a glob to read it", folder, summary)
    return files


def _some(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (", ..." if len(names) > MAX_NAMES_SHOWN else "")


def _identity(path: Path) -> tuple[int, int]:
    """(device, inode) of `path`; raises KitError unless rows can be read from it."""
    with reading(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise KitError(f"INPUT: {path} is not a regular file: give a file ({KINDS_OF_FILES}), a folder or a glob")
        if not found.st_size:  # may also be a file of /proc; files with a size are opened soon anyway
            with path.open("rb", buffering=0) as stream:
                if not stream.read(1):
                    raise KitError(f"{path} is empty: remove it from INPUT, or write its rows again")
    return found.st_dev, found.st_ino


def _warn_repeated(files: list[Path], identities: list[tuple[int, int]]) -> None:
    times = Counter(identities)
    repeated = {identity: str(file) for file, identity in zip(files, identities, strict=True) if times[identity] > 1}
    if repeated:
        logger.warning(
            "INPUT names %d file%s more than once: %s; its rows are read each time",
            len(repeated), "s" if len(repeated) > 1 else "", _some(list(repeated.values())),
        )  # fmt: skip
