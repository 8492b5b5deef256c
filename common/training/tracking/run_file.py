"""Files in SAVE_CHECKPOINT_PATH that a run writes for people: a disk that refuses them does not end the run."""

import errno
import os
from pathlib import Path

from common.errors import describe_os_error
from common.log import logger


class RunFile:
    """A file in the run's folder, written by rank 0 only.

    It is opened for each write: an open file would keep the disk from being mounted read-only, and would outlive a
    folder that is removed. Nothing is written to another disk than the one that the folder was on at first.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._device = path, path.parent.stat().st_dev
        self._failed = False
        self._needs_newline = _ends_within_line(path)

    def append(self, text: str) -> None:
        """Appends `text`, which ends with a newline."""
        if self.append_bytes(text.encode(errors="backslashreplace"), b"\n" * self._needs_newline):
            self._needs_newline = False

    def append_bytes(self, content: bytes, before: bytes = b"") -> bool:
        """Appends `before` and `content`; returns whether the disk took them, and logs when that begins to fail."""
        try:
            if self.path.parent.stat().st_dev != self._device:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(self.path))
            with self.path.open("ab", buffering=0) as stream:
                size = stream.tell()
                if stream.write(before + content) != len(before + content):
                    stream.truncate(size)  # a part of a record would damage what comes after it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            self._needs_newline = True  # a visible gap in a text
            if not self._failed:
                self._failed = True  # before logging: the log itself may be this file
                logger.warning("%s cannot be written, training goes on: %s", self.path, describe_os_error(error))
            return False
        self._failed = False
        return True


def _ends_within_line(path: Path) -> bool:
    """Whether the last line of `path` lacks its newline, as after a kill."""
    try:
        with path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"
    except OSError:  # missing or empty
        return False
