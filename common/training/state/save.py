"""The saving of a run: what is written when, and what becomes of it where the disk fails.

Nothing half-written bears its final name: a checkpoint is written to `iter_….partial`, synced, renamed when every rank
is done, and named in `latest_checkpointed_iteration.txt` last. A disk that is full, read-only or gone ends no run: the
ranks agree that the checkpoint failed, what was written of it is removed, and it is tried again.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.checkpoint.formats.dist_share import Share, write_rest
from common.checkpoint.formats.layout import iteration_dir, write_tracker
from common.log import logger
from common.training.launching.hang_detector import Heartbeat
from common.training.launching.process_group import HostGroup, errors_of_ranks
from common.training.planning.plan import Plan
from common.training.state.contents import Progress, content_of, has_optimizer_state, saved_parts
from common.training.state.retention import Retention
from common.training.state.run_folder import PARTIAL, RunFolder, size_of
from common.training.state.save_torch import make_rank_folders, save_torch
from common.training.state.save_torch_dist import Content, ShareWriter
from common.training.state.training_state import TrainingState, gather_weights


@dataclass
class _Writing:
    """A checkpoint whose shares are being written."""

    writer: ShareWriter
    common: dict[str, Any]
    partial: Path
    final: Path
    iteration: int
    began: float
    stood_still: float = 0.0


class Store:
    """The checkpoint folder that a run writes to; every method is a collective call unless it says otherwise."""

    def __init__(self, plan: Plan, heartbeat: Heartbeat) -> None:
        self.plan = plan
        self.path = Path(plan.settings.save_checkpoint_path)
        self.writer: ShareWriter | None = None
        self.host_group = HostGroup(heartbeat)
        self.overdue = False  # whether a checkpoint that was due could not be written
        self.seconds = 0.0  # that the last one took
        self._writing: _Writing | None = None
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

    def save(self, training_state: TrainingState, progress: Progress) -> bool:
        """Whether a checkpoint of `progress` is written; with ASYNC_SAVE it is only begun, and finished by `finish`."""
        if self._writing and not self.host_group.all_ready(self._writing.writer.is_done):
            logger.info("the checkpoint before is still being written, and is waited for")
        self.finish(wait=True)
        began, final = time.monotonic(), iteration_dir(self.path, progress.iteration)
        partial = self._begin(final, self.plan.ckpt_format)
        if partial is None:
            return False
        if self.plan.ckpt_format == "torch":
            gather_weights(training_state.model)
            weights_only = not self.plan.settings.save_optimizer
            written = self._done(
                lambda: save_torch(self.plan, training_state, progress, partial, weights_only), partial
            )
            return written and self._publish(partial, final, progress.iteration, began, time.monotonic() - began)
        self.writer = self.writer or ShareWriter(self.host_group.heartbeat, asynchronous=self.plan.settings.async_save)
        return self._write(self.writer, content_of(self.plan, training_state, progress), partial, final, began)

    def prepare(self, training_state: TrainingState) -> None:
        """Has the host's memory that an asynchronous save copies to made beside the run's steps, after the first one.

        No collective call; called again, it does nothing.
        """
        if self.plan.settings.async_save and self.writer is None and has_optimizer_state(training_state):
            self.writer = ShareWriter(self.host_group.heartbeat, asynchronous=True)
            self.writer.prepare(saved_parts(self.plan, training_state))

    def _write(self, writer: ShareWriter, content: Content, partial: Path, final: Path, began: float) -> bool:
        writing = _Writing(writer, content.common, partial, final, int(content.common["iteration"]), began)
        if not self._done(lambda: writer.begin(content, partial), partial, meet=not writer.asynchronous):
            return False
        writing.stood_still = time.monotonic() - began
        self._writing = writing
        return True if writer.asynchronous else self.finish(wait=True)

    def _begin(self, final: Path, ckpt_format: str) -> Path | None:
        """The empty folder to write a checkpoint of that format to, beside `final`; None where the disk refuses."""
        partial = final.with_name(final.name + PARTIAL)

        def begin() -> None:
            if self.folder:
                self.folder.begin(final)
                if ckpt_format == "torch":
                    make_rank_folders(self.plan, partial)

        return partial if self._done(begin, partial) else None

    def finish(self, wait: bool) -> bool:
        """Publishes what is written, with `wait` when it is; whether it did, or there was nothing to publish."""
        writing = self._writing
        if writing is None or not (wait or self.host_group.all_ready(writing.writer.is_done)):
            return writing is None
        self._writing, writer = None, writing.writer
        shares: list[Share] = []
        if not self._done(lambda: shares.append(writer.result()), writing.partial, meet=writer.asynchronous):
            return False
        shares = self.host_group.gather(shares[0])

        def complete() -> None:
            if self.folder:
                write_rest(writing.partial, shares, writing.common)

        if not self._done(complete, writing.partial):
            return False
        stood_still = writing.stood_still if writer.asynchronous else time.monotonic() - writing.began
        return self._publish(writing.partial, writing.final, writing.iteration, writing.began, stood_still)

    def write_converted(self, training_state: TrainingState, progress: Progress) -> None:
        """Writes in torch format what was loaded: under its iteration's name, or `release` for weights alone."""
        weights_only = self.plan.start.kind == "weights"
        final = self.path / "release" if weights_only else iteration_dir(self.path, progress.iteration)
        began, partial = time.monotonic(), self._begin(final, "torch")
        if partial and self._done(
            lambda: save_torch(self.plan, training_state, progress, partial, weights_only), partial
        ):
            iteration = "release" if weights_only else progress.iteration
            self._publish(partial, final, iteration, began, time.monotonic() - began)

    def _publish(self, partial: Path, final: Path, iteration: int | str, began: float, stood_still: float) -> bool:
        def publish() -> None:
            if self.folder and self.retention:
                if isinstance(iteration, int):
                    self.retention.write_record()
                self.folder.publish(partial, final)
                write_tracker(self.path, iteration)

        if not self._done(publish, partial):
            return False
        seconds = time.monotonic() - began
        self.overdue, self.seconds = False, seconds
        if self.folder and self.retention:
            size = size_of(final) / 1e6
            stood = f"; training stood still {stood_still:.1f} s" if stood_still < seconds - 0.05 else ""
            logger.info("saved %s: %.1f MB in %.1f s (%.0f MB/s)%s", final, size, seconds, size / seconds, stood)
            if isinstance(iteration, int):
                self.retention.prune(iteration)
        return True

    def _done(self, action: Callable[[], Any], partial: Path, *, meet: bool = False) -> bool:
        """Whether `action` went well on every rank; else the disk's trouble is told, and `partial` removed.

        meet: the ranks may be far apart in time, and are waited for outside of a collective call, which gives up.
        """
        trouble: BaseException | None = None
        try:
            action()
        except Exception as error:
            if not is_disk_trouble(error):
                raise
            trouble = error
        if meet:
            self.host_group.all_ready(ready=True)
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
    if isinstance(error, OSError):
        return True
    # torch.save's own writer tells it thus, and the OSError behind it is lost on the way from another rank.
    return isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
