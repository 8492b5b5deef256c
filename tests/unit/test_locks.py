import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.locks import lock


def failing(number: int) -> Callable[[int, int], None]:
    def how(_handle: int, _kind: int) -> None:
        raise OSError(number, os.strerror(number))

    return how


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported_and_no_error(number: int, caplog: pytest.LogCaptureFixture) -> None:
    lock(0, "/data/x", failing(number))
    assert len(caplog.messages) == 1 and "/data/x: the file system does not support locks" in caplog.text


def test_a_held_lock_and_any_other_failure_are_errors(tmp_path: Path) -> None:
    for number in (errno.EAGAIN, errno.EACCES):
        with pytest.raises(BlockingIOError):
            lock(0, "x", failing(number))
    with pytest.raises(OSError, match="Input/output"):
        lock(0, "x", failing(errno.EIO))
    with (tmp_path / "a").open("w") as one, (tmp_path / "a").open("w") as two:
        lock(one.fileno(), "a", fcntl.flock)
        with pytest.raises(BlockingIOError):
            lock(two.fileno(), "a", fcntl.flock)
