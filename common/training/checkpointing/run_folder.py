"""SAVE_CHECKPOINT_PATH: the checks before a run, and the folder that its checkpoints are published in."""

import errno
import shutil
import time
from pathlib import Path

from common.checkpoint.formats.checkpoint_paths import list_iterations
from common.checkpoint.formats.checkpoint_size import checkpoint_bytes
from common.checkpoint.formats.model_files import model_files
from common.errors import KitError
from common.files import PARTIAL, sync, write_atomically
from common.folders import check_writable, existing_part, free_bytes, write_test
from common.log import logger
from common.training.checkpointing.folder_lock import LOCK_FILE, take_lock
from common.training.planning.plan import Plan

REMOVING = ".removing"  # suffix of folders that are being removed, as PARTIAL is of those that are being written


def bytes_of_checkpoint(plan: Plan) -> int:
    """The size of one checkpoint of the run."""
    settings = plan.settings
    return checkpoint_bytes(
        plan.qwen,
        settings.precision,
        save_optimizer=settings.save_optimizer,
        ckpt_format=plan.ckpt_format,
        pp=plan.sizes.pp,
        optimizer_state=settings.optimizer_state,
        lora=plan.adapters.lora if plan.adapters else None,
    )


def check_folder(plan: Plan) -> None:
    """Raises KitError unless the run can save: the folder is writable, and has room for a checkpoint.

    Creates nothing there. Warns if KEEP_CHECKPOINTS checkpoints will not fit.
    """
    folder, keep = Path(plan.settings.save_checkpoint_path), plan.settings.keep_checkpoints
    size_bytes = bytes_of_checkpoint(plan)
    check_writable(folder, f"SAVE_CHECKPOINT_PATH={folder}")
    free = free_bytes(folder)
    size = f"a checkpoint of this run takes {size_bytes / 1e9:.2f} GB"
    if free < size_bytes:
        raise KitError(
            f"SAVE_CHECKPOINT_PATH={folder} has {free / 1e9:.2f} GB free, and {size}: make room, or use another folder"
        )
    more = max(0, keep + 1 - len(list_iterations(folder)))  # one more than is kept, while the newest is written
    if keep and free < more * size_bytes:
        logger.warning(
            "SAVE_CHECKPOINT_PATH=%s has %.2f GB free, %s, and KEEP_CHECKPOINTS=%d needs room for %d more: saving will"
            " fail when the disk is full", folder, free / 1e9, size, keep, more,
        )  # fmt: skip


class RunFolder:
    """The run's folder, locked and managed by rank 0. Every method raises OSError when the disk refuses."""

    def __init__(self, plan: Plan) -> None:
        self.path, self.needed_bytes = Path(plan.settings.save_checkpoint_path), bytes_of_checkpoint(plan)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.path)
        self._device = self.path.stat().st_dev
        self._remove_leftovers()
        # A few megabytes, kept in memory in case the folder that they are read from is the one that is lost.
        source = plan.start.model_folder
        self._model_files = {name: (source / name).read_bytes() for name in model_files(source).files}

    def check_disk(self) -> None:
        """Raises OSError unless a checkpoint can be written now, to the disk that the run began with."""
        moved = existing_part(self.path).stat().st_dev != self._device
        if moved and not (self.path / LOCK_FILE).exists():
            raise OSError(errno.ENODEV, "it is on another disk than when the run began: is it mounted?", str(self.path))
        self.path.mkdir(parents=True, exist_ok=True)
        write_test(self.path)
        free = free_bytes(self.path)
        if free < self.needed_bytes:
            text = f"{free / 1e9:.2f} GB free, and a checkpoint takes {self.needed_bytes / 1e9:.2f} GB"
            raise OSError(errno.ENOSPC, text, str(self.path))

    def begin(self, final: Path) -> Path:
        """A new, empty folder to write to, beside `final`; also restores the model's own files beside it."""
        self.check_disk()
        partial = final.with_name(final.name + PARTIAL)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        for name, content in self._model_files.items():
            if not (self.path / name).exists():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path / name, content)
        return partial

    def publish(self, partial: Path, final: Path) -> None:
        """Gives `partial` its final name; a checkpoint that it replaces is removed by `remove_replaced`, later."""
        if final.exists():
            final.rename(self._removing(final))
        partial.rename(final)
        sync(self.path)

    def remove(self, checkpoint: Path) -> None:
        """Removes a checkpoint; renames it first, so that no partial checkpoint has a final name."""
        removing = self._removing(checkpoint)
        checkpoint.rename(removing)
        shutil.rmtree(removing)

    def remove_replaced(self) -> None:
        """Removes what `publish` replaced, and what an earlier `remove` left."""
        for each in self.path.glob(f"*{REMOVING}*"):
            shutil.rmtree(each)

    def _removing(self, checkpoint: Path) -> Path:
        return checkpoint.with_name(f"{checkpoint.name}{REMOVING}_{time.time_ns()}")

    def _remove_leftovers(self) -> None:
        paths = [path for suffix in (PARTIAL, f"{REMOVING}*") for path in self.path.glob(f"*{suffix}")]
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if paths:
            logger.info("removed leftovers of a killed run: %s", ", ".join(path.name for path in paths))


def size_of(checkpoint: Path) -> int:
    """The bytes of all files in `checkpoint`."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
