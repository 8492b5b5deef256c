"""The lock on SAVE_CHECKPOINT_PATH: only one run writes there."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from common.errors import KitError
from common.log import logger

LOCK_FILE = ".lock"
LOCK_TIMEOUT_S = 30  # what a killed rank needs to end and to free its GPU


def take_lock(folder: Path, timeout_s: float = LOCK_TIMEOUT_S) -> int:
    """The file descriptor that holds the lock on `folder` while it is open; -1 if the file system has no locks.

    Raises KitError if another run still holds it after `timeout_s` seconds. The system releases it when this process
    and those that it has forked since have ended, in whatever way.
    """
    path = folder / LOCK_FILE
    path.touch()
    handle = os.open(path, os.O_RDONLY)  # open for writing, it would keep the disk from being mounted read-only
    end, logged = time.monotonic() + timeout_s, False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise KitError(
                    f"SAVE_CHECKPOINT_PATH={folder} is being written by another run ({_holder(path)}): wait for it,"
                    " stop it, or use another folder"
                ) from error
            if not logged:
                logger.info("waiting for the run that writes to %s (%s)", folder, _holder(path))
                logged = True
            time.sleep(0.2)
        except OSError as error:
            logger.warning("%s: the file system has no locks (%s): start only one run that writes there", path, error)
            os.close(handle)
            return -1
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}))
    return handle


def check_lock(folder: Path) -> None:
    """Raises KitError if another run writes to `folder`; leaves nothing there and holds nothing."""
    if folder.is_dir() and (folder / LOCK_FILE).exists():
        handle = take_lock(folder)
        if handle >= 0:
            os.close(handle)


def _holder(path: Path) -> str:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
