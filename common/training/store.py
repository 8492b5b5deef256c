"""The saving of a run: what is written when, and what becomes of it where the disk fails.

Nothing half-written bears its final name: a checkpoint is written to `iter_….partial`, synced, renamed when every rank
is done, and named in `latest_checkpointed_iteration.txt` last. A disk that is full, read-only or gone ends no run: the
ranks agree that the checkpoint failed, what was written of it is removed, and it is tried again.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from common.checkpoint.layout import iteration_dir, write_tracker
from common.log import logger
from common.mcore import save_options
from common.training.distributed import errors_of_ranks
from common.training.fp8_state import has_fp8_state
from common.training.optimizer import Trainee, gather_weights
from common.training.plan import Plan
from common.training.retention import Retention
from common.training.run_folder import PARTIAL, RunFolder, size_of
from common.training.state import Progress, describe_run, model_shards, sharded_state
from common.training.torch_dist_save import save_torch_dist
from common.training.torch_save import make_rank_folders, save_torch


class Store:
    """The checkpoint folder that a run writes to; every method is a collective call unless it says otherwise."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.path = Path(plan.settings.save_checkpoint_path)
        self.asynchronous = AsyncCallsQueue() if plan.settings.async_save else None
        self.overdue = False  # whether a checkpoint that was due could not be written
        self.seconds = 0.0  # that the last one took
        self._writing: tuple[Path, Path, int, float] | None = None
        self.folder: RunFolder | None = None  # rank 0's
        self.retention: Retention | None = None
        if dist.get_rank() == 0:
            self.folder = RunFolder(plan)
            self.retention = Retention(plan.settings, self.folder)

    def note(self, iteration: int, *, validation_loss: float | None = None, epoch_ends: bool = False) -> None:
        """Takes note of what decides whether the checkpoint of `iteration` is kept; no collective call."""
        if self.retention is None:
            return
        if validation_loss is not None:
            self.retention.record.validation_losses[iteration] = validation_loss
        if epoch_ends:
            self.retention.record.epoch_ends.add(iteration)

    def save(self, trainee: Trainee, progress: Progress) -> bool:
        """Whether a checkpoint of `progress` is written; with ASYNC_SAVE it is only begun, and finished by `finish`."""
        self.finish(wait=True)
        gather_weights(trainee.model)
        began, final = time.monotonic(), iteration_dir(self.path, progress.iteration)
        partial = self._begin(final, self.plan.ckpt_format)
        if partial is None:
            return False
        if self.asynchronous is not None:
            self._writing = (partial, final, progress.iteration, began)
            return self._done(lambda: self._schedule(trainee, progress, partial), partial)
        if not self._done(lambda: self._write(trainee, progress, partial), partial):
            return False
        return self._publish(partial, final, progress.iteration, began)

    def _begin(self, final: Path, ckpt_format: str) -> Path | None:
        """The empty folder to write a checkpoint of that format to, beside `final`; None where the disk refuses."""
        partial = final.with_name(final.name + PARTIAL)

        def begin() -> None:
            if self.folder:
                self.folder.begin(final)
                if ckpt_format == "torch":
                    make_rank_folders(self.plan, partial)

        return partial if self._done(begin, partial) else None

    def _write(self, trainee: Trainee, progress: Progress, partial: Path) -> None:
        if self.plan.ckpt_format == "torch":
            save_torch(self.plan, trainee, progress, partial, not self.plan.settings.save_optimizer)
        else:
            save_torch_dist(self._state(trainee, progress), partial)

    def _state(self, trainee: Trainee, progress: Progress) -> dict[str, Any]:
        """The sharded state dict."""
        whole = self.plan.settings.save_optimizer
        with_fp8 = has_fp8_state(self.plan.settings)
        state = sharded_state(trainee, loading=False, with_fp8=with_fp8) if whole else model_shards(trainee)
        run = describe_run(self.plan, progress)
        return state | {"iteration": progress.iteration, "checkpoint_version": 3.0, "run": run} | save_options()

    def _schedule(self, trainee: Trainee, progress: Progress, partial: Path) -> None:
        assert self.asynchronous is not None
        request = dist_checkpointing.save(self._state(trainee, progress), str(partial), async_sharded_save=True)
        self.asynchronous.schedule_async_request(request)

    def finish(self, wait: bool) -> None:
        """Publishes an asynchronous checkpoint that is written; with `wait`, waits for it."""
        if self._writing is None or self.asynchronous is None:
            return
        partial, final, iteration, began = self._writing
        queue, finished = self.asynchronous, []
        if self._done(lambda: finished.extend(queue.maybe_finalize_async_calls(blocking=wait)), partial):
            if finished:
                self._writing = None
                self._publish(partial, final, iteration, began)
        else:
            self._writing = None

    def write_converted(self, trainee: Trainee, progress: Progress) -> None:
        """Writes in torch format what was loaded: under its iteration's name, or `release` for weights alone."""
        weights_only = self.plan.start.kind == "weights"
        final = self.path / "release" if weights_only else iteration_dir(self.path, progress.iteration)
        began, partial = time.monotonic(), self._begin(final, "torch")
        if partial and self._done(lambda: save_torch(self.plan, trainee, progress, partial, weights_only), partial):
            self._publish(partial, final, "release" if weights_only else progress.iteration, began)

    def _publish(self, partial: Path, final: Path, iteration: int | str, began: float) -> bool:
        def publish() -> None:
            if self.folder and self.retention:
                if isinstance(iteration, int):
                    self.retention.write_record()
                self.folder.publish(partial, final)
                write_tracker(self.path, iteration)

        if not self._done(publish, partial):
            return False
        self.overdue, self.seconds = False, time.monotonic() - began
        if self.folder and self.retention:
            size = size_of(final) / 1e6
            logger.info("saved %s: %.1f MB in %.1f s (%.0f MB/s)", final, size, self.seconds, size / self.seconds)
            if isinstance(iteration, int):
                self.retention.prune(iteration)
        return True

    def _done(self, action: Callable[[], Any], partial: Path) -> bool:
        """Whether `action` went well on every rank; else the disk's trouble is told, and `partial` removed."""
        trouble: BaseException | None = None
        try:
            action()
        except (Exception, CheckpointException) as error:  # which is no Exception
            if not is_disk_trouble(error):
                raise
            trouble = error
        texts = errors_of_ranks(trouble)
        if texts:
            self.overdue = True
            if self.folder:
                logger.warning("NOT SAVED to %s: %s; it is tried again until it can be", self.path, texts[0])
                shutil.rmtree(partial, ignore_errors=True)
        return not texts

    def close(self) -> None:
        """Finishes what was begun."""
        self.finish(wait=True)
        if self.retention:
            self.retention.wait()


def is_disk_trouble(error: BaseException) -> bool:
    """Whether it says that a disk refuses to write, and not that the program is wrong."""
    if isinstance(error, CheckpointException):
        return all(is_disk_trouble(each[0]) for each in error.failures.values())
    if isinstance(error, OSError):
        return True
    # torch.save's own writer tells it thus, and the OSError behind it is lost on the way from another rank.
    return isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
