"""File locks that the kernel releases when the process that holds them dies.

Why not the `filelock` package: a conversion locks its output folder itself, and filelock only locks a file that it
creates and opens for writing, which also keeps the file system from being remounted read-only; where the file system
has no locks, it fails, or falls back to a lock file that outlives a killed run, where these warn and go on; and it has
no shared lock on a plain file, by which runs with a PARTITION_INDEX share one folder.
"""

import errno
import fcntl
import os
from collections.abc import Callable

from common.log import logger

# From file systems without locks: Lustre without -o flock, FUSE, NFS without a lock service.
NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
HELD = {errno.EAGAIN, errno.EACCES}


def lock(handle: int, name: object, how: Callable[[int, int], None] = fcntl.lockf, shared: bool = False) -> None:
    """Locks the open file `handle` without waiting; raises BlockingIOError if another process holds it.

    how: fcntl.lockf, which a forked child does not inherit; or fcntl.flock, which it does, and which can lock a folder.
    Where the file system does not support locks, logs a warning that names `name` and goes on.
    """
    try:
        how(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from error
        if error.errno not in NOT_SUPPORTED:
            raise
        logger.warning(
            "%s: the file system does not support locks (%s): nothing keeps a second run out, so start only one",
            name, os.strerror(error.errno or 0),
        )  # fmt: skip
