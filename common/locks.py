"""Locks that end with the process that holds them, and a word where the file system has none."""

import errno
import fcntl
import os
from collections.abc import Callable

from common.log import logger

# What a file system without locks says: Lustre without -o flock, FUSE, NFS without a lock service.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
HELD = {errno.EAGAIN, errno.EACCES}


def lock(handle: int, name: object, how: Callable[[int, int], None] = fcntl.lockf, shared: bool = False) -> None:
    """Locks the open file `handle`; raises BlockingIOError when another process holds it.

    how: fcntl.lockf, which a forked child does not hold; or fcntl.flock, which a folder can have. Where the file
    system knows no locks it goes on, and says so of `name`.
    """
    try:
        how(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from error
        if error.errno not in NO_LOCKS:
            raise
        logger.warning(
            "%s: the file system has no locks (%s), so nothing keeps a second run out of it: start one only",
            name, os.strerror(error.errno or 0),
        )  # fmt: skip
