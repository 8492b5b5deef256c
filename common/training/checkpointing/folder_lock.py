"""The lock on SAVE_CHECKPOINT_PATH: only one run writes there."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from common.errors import KitError
from common.locks import lock
from common.log import logger

LOCK_FILE = ".lock"
LOCK_TIMEOUT_S = 30  # what a killed rank needs to end and to free its GPU


def take_lock(folder: Path, timeout_s: float = LOCK_TIMEOUT_S) -> int:
    """The file descriptor that holds the lock on `folder` while it is open.

    Raises KitError if another run still holds it after `timeout_s` seconds. The system releases it when this process
    and those that it has forked since have ended, in whatever way.
    """
    path = folder / LOCK_FILE
    path.touch()
    handle = os.open(path, os.O_RDONLY)  # open for writing, it would keep the disk from being mounted read-only
    end, logged = time.monotonic() + timeout_s, False
    while True:
        try:
            lock(handle, folder, fcntl.flock)
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
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}))
    return handle


def check_lock(folder: Path) -> None:
    """Raises KitError if another run writes to `folder`; leaves nothing there and holds nothing."""
    if folder.is_dir() and (folder / LOCK_FILE).exists():
        os.close(take_lock(folder))


def _holder(path: Path) -> str:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
