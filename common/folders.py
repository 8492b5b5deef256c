"""Whether a folder can be written to, and how much room it has."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import writing


def existing_part(path: Path) -> Path:
    """`path`, or its nearest parent that exists, which may be a file or a dangling symbolic link."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if os.path.lexists(each))


@contextmanager
def named_in_utf8(folder: Path) -> Iterator[Path]:
    """`folder`, or where its name is not UTF-8 another of the same folder, for the block; raises OSError.

    Libraries in Rust, such as tokenizers, open no file with such a name.
    """
    if os.fsencode(folder).decode(errors="replace").encode() == os.fsencode(folder):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write to the file system of `path`, which need not exist."""
    found = os.statvfs(existing_part(path))
    return found.f_bavail * found.f_frsize


def write_test(folder: Path) -> None:
    """Writes a temporary file in the existing `folder` and syncs it to the disk; raises OSError."""
    # O_TMPFILE where the file system has it: a process that is killed here leaves nothing. Unbuffered: on a full disk
    # close() would raise a second time.
    with tempfile.TemporaryFile(dir=folder, prefix=".write_test_", buffering=0) as stream:
        stream.write(b"x" * 4096)
        os.fsync(stream.fileno())


def check_writable(folder: Path, name: str) -> None:
    """Raises KitError, which begins with `name`, unless `folder`, or its nearest existing parent, can be written to.

    Creates nothing that stays.
    """
    with writing(name):
        there = existing_part(folder)
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        write_test(there)
