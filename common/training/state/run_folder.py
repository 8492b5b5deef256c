"""SAVE_CHECKPOINT_PATH as a place to write to: one writer, room for a checkpoint, nothing left of a killed run."""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from common.atomic_file import sync
from common.checkpoint.formats.layout import list_iterations
from common.checkpoint.formats.model_files import model_files
from common.checkpoint.formats.size import checkpoint_bytes
from common.errors import KitError
from common.folders import check_writable, existing_part, free_bytes, write_test
from common.locks import lock
from common.log import logger
from common.training.planning.plan import Plan

LOCK_FILE = ".lock"
PARTIAL, REMOVING = ".partial", ".removing"  # ends of the names of folders that are being written, or removed
LOCK_WAIT_S = 30  # what a killed rank needs to end, with all that it holds of a GPU


def bytes_of_checkpoint(plan: Plan) -> int:
    """The size of one checkpoint of the run."""
    chosen = plan.settings
    return checkpoint_bytes(
        plan.qwen,
        chosen.precision,
        save_optimizer=chosen.save_optimizer,
        ckpt_format=plan.ckpt_format,
        pp=plan.sizes.pp,
        optimizer_state=chosen.optimizer_state,
    )


def check_folder(plan: Plan) -> None:
    """Raises KitError unless the run can save: no other run does there, it can be written to, a checkpoint finds room.

    Makes nothing there. Where KEEP_CHECKPOINTS will not find room, a warning says so.
    """
    folder, keep = Path(plan.settings.save_checkpoint_path), plan.settings.keep_checkpoints
    size_bytes = bytes_of_checkpoint(plan)
    if plan.settings.nnodes == 1:  # a node that comes back finds the lock of the run that it is of
        check_lock(folder)
    check_writable(folder, f"SAVE_CHECKPOINT_PATH={folder}")
    free = free_bytes(folder)
    size = f"a checkpoint of this run takes {size_bytes / 1e9:.2f} GB"
    if free < size_bytes:
        raise KitError(
            f"SAVE_CHECKPOINT_PATH={folder} has {free / 1e9:.2f} GB free, and {size}: make room, or choose another"
        )
    more = max(0, keep + 1 - len(list_iterations(folder)))  # one more than are kept, while the newest is written
    if keep and free < more * size_bytes:
        logger.warning(
            "SAVE_CHECKPOINT_PATH=%s has %.2f GB free, %s, and KEEP_CHECKPOINTS=%d needs room for %d more: saving will"
            " fail when it is full", folder, free / 1e9, size, keep, more,
        )  # fmt: skip


class RunFolder:
    """The folder in rank 0's hands. Every method raises OSError where the disk refuses."""

    def __init__(self, plan: Plan) -> None:
        self.path, self.needed_bytes = Path(plan.settings.save_checkpoint_path), bytes_of_checkpoint(plan)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.path)
        self._device = self.path.stat().st_dev
        self._remove_leftovers()
        # Kept, since the folder may be the very one that is lost: a few megabytes.
        folder = plan.start.model_folder
        self._model_files = {name: (folder / name).read_bytes() for name in model_files(folder).files}

    def probe(self) -> None:
        """Raises OSError unless a checkpoint can be written now, to the disk that the run began with."""
        there = existing_part(self.path)
        if there.stat().st_dev != self._device and not (self.path / LOCK_FILE).exists():
            raise OSError(errno.ENODEV, "it is on another disk than when the run began: is it mounted?", str(self.path))
        self.path.mkdir(parents=True, exist_ok=True)
        write_test(self.path)
        free = free_bytes(self.path)
        if free < self.needed_bytes:
            text = f"{free / 1e9:.2f} GB are free, and a checkpoint takes {self.needed_bytes / 1e9:.2f} GB"
            raise OSError(errno.ENOSPC, text, str(self.path))

    def begin(self, final: Path) -> Path:
        """The new, empty folder to write to, beside `final`; the model's own files are put beside both."""
        self.probe()
        partial = final.with_name(final.name + PARTIAL)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        for name, content in self._model_files.items():
            if not (self.path / name).exists():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                write_file(self.path / name, content)
        return partial

    def publish(self, partial: Path, final: Path) -> None:
        """Gives `partial` its final name; what bore it is removed by `remove`, later."""
        if final.exists():
            final.rename(self._aside(final))
        partial.rename(final)
        sync(self.path)

    def remove(self, checkpoint: Path) -> None:
        """Removes a checkpoint; half removed, it bears no checkpoint's name."""
        aside = self._aside(checkpoint)
        checkpoint.rename(aside)
        shutil.rmtree(aside)

    def remove_asides(self) -> None:
        """Removes what `publish` replaced."""
        for each in self.path.glob(f"*{REMOVING}*"):
            shutil.rmtree(each)

    def _aside(self, checkpoint: Path) -> Path:
        return checkpoint.with_name(f"{checkpoint.name}{REMOVING}_{time.time_ns()}")

    def _remove_leftovers(self) -> None:
        names = [path for end in (PARTIAL, f"{REMOVING}*") for path in self.path.glob(f"*{end}")]
        for path in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if names:
            logger.info("removed what a run that was killed left: %s", ", ".join(path.name for path in names))


def take_lock(folder: Path, wait_s: float = LOCK_WAIT_S) -> int:
    """The descriptor that keeps other runs out of `folder` while it is open.

    Raises KitError when another run holds it for longer than `wait_s` seconds. The system lets it go when this process
    and what it has forked since have ended, however they do.
    """
    path = folder / LOCK_FILE
    path.touch()
    handle = os.open(path, os.O_RDONLY)  # open for writing, it would keep the disk from being mounted read-only
    end, said = time.monotonic() + wait_s, False
    while True:
        try:
            lock(handle, folder, fcntl.flock)
            break
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise KitError(
                    f"SAVE_CHECKPOINT_PATH={folder} is being written by another run ({_holder(path)}): wait for it,"
                    " stop it, or choose another folder"
                ) from error
            if not said:
                logger.info("waiting for the run that writes to %s (%s)", folder, _holder(path))
                said = True
            time.sleep(0.2)
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}))
    return handle


def check_lock(folder: Path) -> None:
    """Raises KitError when another run writes to `folder`, before this one starts anything."""
    if folder.is_dir() and (folder / LOCK_FILE).exists():
        os.close(take_lock(folder))


def _holder(path: Path) -> str:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def write_file(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, which never holds half of it, and is on the disk when this returns."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync(path.parent)


def size_of(checkpoint: Path) -> int:
    """The bytes of all files below `checkpoint`."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
