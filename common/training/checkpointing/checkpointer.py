"""The Checkpointer: when a run's checkpoints are written and published, and what happens when the disk fails.

A checkpoint gets its final name only when it is complete: it is written to `iter_….partial`, synced, renamed when every
rank is done, and named in `latest_checkpointed_iteration.txt` last. A full, read-only or missing disk does not end a
run: the ranks agree that the save failed, remove the partial checkpoint, and save again later.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.checkpoint.formats.checkpoint_paths import iteration_dir, write_tracker
from common.checkpoint.formats.torch_dist_writer import RankWriteResults, finish_checkpoint
from common.files import PARTIAL
from common.log import logger
from common.training.checkpointing.hf_export import HfExporter
from common.training.checkpointing.optimizer_state import has_optimizer_state
from common.training.checkpointing.retention import Retention
from common.training.checkpointing.run_folder import RunFolder, size_of
from common.training.checkpointing.save_torch import make_rank_dirs, save_torch
from common.training.checkpointing.save_torch_dist import TorchDistWriter
from common.training.checkpointing.state_dict import generate_state_dict, shards_to_save
from common.training.launching.hang_detector import Heartbeat
from common.training.launching.process_group import HostGroup, errors_of_ranks
from common.training.planning.plan import Plan, Progress
from common.training.state.data_parallel import gather_params
from common.training.state.training_state import TrainingState


@dataclass
class _PendingSave:
    """A torch_dist checkpoint that the ranks are writing."""

    writer: TorchDistWriter
    common: dict[str, Any]
    partial: Path
    final: Path
    iteration: int
    began: float
    blocked_s: float = 0.0  # how long training was paused


class Checkpointer:
    """Saves a run's checkpoints; every method is a collective call unless it is marked otherwise."""

    def __init__(self, plan: Plan, heartbeat: Heartbeat) -> None:
        self.plan = plan
        self.path = Path(plan.settings.save_checkpoint_path)
        self.writer: TorchDistWriter | None = None
        self.host_group = HostGroup(heartbeat)
        self.newest: int | None = None  # the iteration saved last
        self.overdue = False  # whether the last save failed
        self.last_save_s = 0.0  # how long the last save took
        self._pending: _PendingSave | None = None
        self.folder: RunFolder | None = None  # on rank 0
        self.retention: Retention | None = None
        self.exporter: HfExporter | None = None
        if dist.get_rank() == 0:
            self.folder = RunFolder(plan)
            self.retention = Retention(plan.settings, self.folder, plan.valid_hashes)
            self.exporter = HfExporter(plan.settings.export_hf, self.path, adapters=bool(plan.adapters))

    def record(self, iteration: int, *, validation_loss: float | None = None, epoch_ends: bool = False) -> None:
        """Records what decides whether the checkpoint of `iteration` is kept; no collective call."""
        if self.retention is None:
            return
        if validation_loss is not None:
            self.retention.record.validation_losses[iteration] = validation_loss
        if epoch_ends:
            self.retention.record.epoch_ends.add(iteration)

    def allocate_staging(self, training_state: TrainingState) -> None:
        """With ASYNC_SAVE, starts to allocate host memory for the state in a thread; after the first step, once.

        No collective call.
        """
        if self.plan.settings.async_save and self.writer is None and has_optimizer_state(training_state):
            self.writer = TorchDistWriter(self.host_group.heartbeat, async_save=True)
            self.writer.allocate_staging(shards_to_save(self.plan, training_state))

    def save(self, training_state: TrainingState, progress: Progress) -> bool:
        """Saves a checkpoint of `progress`, or, with ASYNC_SAVE, starts to; returns whether that succeeded."""
        if self._pending and not self.host_group.all_ready(self._pending.writer.is_done):
            logger.info("waiting for the previous checkpoint to be written")
        self.finalize(wait=True)
        began, final = time.monotonic(), iteration_dir(self.path, progress.iteration)
        partial = self._begin(final, self.plan.ckpt_format)
        if partial is None:
            return False
        if self.plan.ckpt_format == "torch":
            gather_params(training_state.model)
            weights_only = not self.plan.settings.save_optimizer
            return self._save_torch(training_state, progress, partial, final, began, weights_only=weights_only)
        return self._save_torch_dist(training_state, progress, partial, final, began)

    def finalize(self, *, wait: bool) -> bool:
        """Publishes the pending checkpoint if it is written, or with `wait` when it is; False if that failed."""
        pending = self._pending
        if pending is None or not (wait or self.host_group.all_ready(pending.writer.is_done)):
            return pending is None
        self._pending, writer = None, pending.writer
        results: list[RankWriteResults] = []
        if not self._try(lambda: results.append(writer.result()), pending.partial, wait_for_ranks=writer.async_save):
            return False
        results = self.host_group.gather(results[0])

        def write_metadata() -> None:
            if self.folder:
                finish_checkpoint(pending.partial, results, pending.common)

        if not self._try(write_metadata, pending.partial):
            return False
        blocked_s = pending.blocked_s if writer.async_save else time.monotonic() - pending.began
        return self._publish(pending.partial, pending.final, pending.iteration, pending.began, blocked_s)

    def poll_exports(self) -> None:
        """Logs an export that has ended and starts the next; no collective call."""
        if self.exporter:
            self.exporter.poll()

    def save_converted(self, training_state: TrainingState, progress: Progress) -> None:
        """Saves what was loaded in torch format: under its iteration's name, or as `release` for weights only."""
        weights_only = self.plan.start.kind == "weights"
        final = self.path / "release" if weights_only else iteration_dir(self.path, progress.iteration)
        began, partial = time.monotonic(), self._begin(final, "torch")
        if partial:
            self._save_torch(training_state, progress, partial, final, began, weights_only=weights_only)

    def close(self, at_once: Callable[[], bool]) -> None:
        """Finalizes the pending checkpoint, and waits for removals in progress and for exports, but not `at_once`."""
        self.finalize(wait=True)
        self._finish_exports(at_once)
        if self.retention:
            self.retention.wait()

    def _finish_exports(self, at_once: Callable[[], bool]) -> None:
        if self.plan.settings.export_hf == "none":
            return
        if self.exporter and self.retention:
            while not self.exporter.poll():
                self.host_group.heartbeat.beat("exporting")
                if at_once():
                    self.exporter.stop()
                time.sleep(0.2)
            if self.newest is not None:
                self.retention.prune(self.newest)  # what was kept for an export
        self.host_group.all_ready(ready=True)  # collectives of the others would time out meanwhile

    def _begin(self, final: Path, ckpt_format: str) -> Path | None:
        """The empty folder, beside `final`, to write a checkpoint of that format to; None if the disk refuses."""
        partial = final.with_name(final.name + PARTIAL)

        def begin() -> None:
            if self.folder:
                self.folder.begin(final)
                if ckpt_format == "torch":
                    make_rank_dirs(self.plan, partial)

        return partial if self._try(begin, partial) else None

    def _save_torch(
        self, training_state: TrainingState, progress: Progress, partial: Path, final: Path, began: float,
        *, weights_only: bool,
    ) -> bool:  # fmt: skip
        def save() -> None:
            save_torch(self.plan, training_state, progress, partial, weights_only=weights_only)

        if not self._try(save, partial):
            return False
        iteration = final.name if final.name == "release" else progress.iteration
        return self._publish(partial, final, iteration, began, time.monotonic() - began)

    def _save_torch_dist(
        self, training_state: TrainingState, progress: Progress, partial: Path, final: Path, began: float
    ) -> bool:
        if self.writer is None:
            self.writer = TorchDistWriter(self.host_group.heartbeat, async_save=self.plan.settings.async_save)
        writer, state_dict = self.writer, generate_state_dict(self.plan, training_state, progress)
        if not self._try(lambda: writer.write(state_dict, partial), partial, wait_for_ranks=not writer.async_save):
            return False
        blocked_s = time.monotonic() - began
        self._pending = _PendingSave(writer, state_dict.common, partial, final, progress.iteration, began, blocked_s)
        return True if writer.async_save else self.finalize(wait=True)

    def _publish(self, partial: Path, final: Path, iteration: int | str, began: float, blocked_s: float) -> bool:
        def publish() -> None:
            if self.folder and self.retention:
                if isinstance(iteration, int):
                    self.retention.write_record()
                self.folder.publish(partial, final)
                write_tracker(self.path, iteration)

        if not self._try(publish, partial):
            return False
        seconds = time.monotonic() - began
        self.overdue, self.last_save_s = False, seconds
        if self.folder and self.retention:
            size = size_of(final) / 1e6
            paused = f"; training paused {blocked_s:.1f} s" if blocked_s < seconds - 0.05 else ""
            logger.info("saved %s: %.1f MB in %.1f s (%.0f MB/s)%s", final, size, seconds, size / seconds, paused)
            if isinstance(iteration, int):
                self.newest = iteration
                self._export(iteration)
                self.retention.prune(iteration, self.exporter.needed if self.exporter else set())
        return True

    def _export(self, iteration: int) -> None:
        assert self.exporter and self.retention
        losses = self.retention.record.validation_losses
        self.exporter.add(iteration, is_best=iteration in losses and losses[iteration] == min(losses.values()))

    def _try(self, action: Callable[[], Any], partial: Path, *, wait_for_ranks: bool = False) -> bool:
        """Whether `action` succeeded on every rank; if not, logs the disk's error and removes `partial`.

        wait_for_ranks: the ranks may finish far apart, so they first wait for each other outside of a collective with
        a timeout.
        """
        disk_error: BaseException | None = None
        try:
            action()
        except Exception as error:
            if not is_disk_error(error):
                raise
            disk_error = error
        if wait_for_ranks:
            self.host_group.all_ready(ready=True)
        errors = errors_of_ranks(disk_error)
        if errors:
            self.overdue = True
            if self.folder:
                logger.warning("NOT SAVED to %s: %s; the save will be retried", self.path, errors[0])
                shutil.rmtree(partial, ignore_errors=True)
        return not errors


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk refused to write, as opposed to a bug."""
    if isinstance(error, OSError):
        return True
    # From torch.save's own writer; the OSError behind it is lost on the way from another rank.
    return isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
