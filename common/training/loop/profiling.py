"""PROFILE and MEMORY_SNAPSHOT: traces of steps and pictures of the device memory, in the run's folder.

What cannot be written is one warning; the run goes on.
"""

import gzip
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from common.checkpoint.formats.model_files import PROFILE_FOLDER
from common.errors import describe_os_error
from common.log import logger
from common.training.planning.plan import Plan

WARM_UP = 1  # a step before the first one that is traced: the profiler's own start takes time
SNAPSHOT_STEPS = 3  # without PROFILE: by then Adam has its moments, and memory is as it stays
MAX_ENTRIES = 100_000  # allocations that are remembered, as in torchtitan's profiling.py


def profile_folder(plan: Plan) -> Path:
    """Where the run's traces and snapshots go."""
    return Path(plan.settings.save_checkpoint_path) / PROFILE_FOLDER


class Profiler:
    """Traces this rank's steps of PROFILE with torch.profiler, and takes MEMORY_SNAPSHOT's picture at their end."""

    def __init__(self, plan: Plan, rank: int) -> None:
        settings, done = plan.settings, plan.progress.iteration
        self.folder, self.rank = profile_folder(plan), rank
        first, last = settings.profile_steps or (0, 0)
        selected = settings.profiles_rank(rank)
        self.first, self.last = max(first, done + 1), last
        self.begin = max(self.first - WARM_UP, done + 1) if selected and last > done else 0
        self.snapshot_at = 0
        if settings.memory_snapshot and selected:
            self.snapshot_at = last if last > done else done + SNAPSHOT_STEPS
        self.device = plan.platform.device
        self.profile: Any = None
        self.traced = 0  # the last step in the trace

    def before(self, iteration: int) -> None:
        """Begins the trace, if `iteration` is its first step, or the warm-up before it."""
        if iteration == self.begin:
            kinds = torch.profiler.supported_activities()
            schedule = torch.profiler.schedule(
                wait=0, warmup=self.first - self.begin, active=self.last - self.first + 1, repeat=1
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a schedule without warm-up, in a run's first step
                self.profile = torch.profiler.profile(activities=kinds, schedule=schedule, record_shapes=True)
                self.profile.start()

    def is_due(self, iteration: int) -> bool:
        """Whether `after` has something to write at the end of step `iteration`."""
        return iteration == self.snapshot_at or (self.profile is not None and iteration == self.last)

    def after(self, iteration: int) -> None:
        """Ends the step `iteration`, and writes what is complete with it."""
        if self.profile is not None:
            self.traced = iteration
            if iteration == self.last:
                self._end_trace()
            else:
                self.profile.step()
        if iteration == self.snapshot_at:
            write_snapshot(self.folder, f"memory_step_{iteration}_rank_{self.rank}")

    def close(self) -> None:
        """Writes the steps that a run which ends within PROFILE has traced."""
        if self.profile is not None and self.traced >= self.first:
            self._end_trace()

    def _end_trace(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()  # kernels that are still running belong to the last step
        profile, self.profile = self.profile, None
        profile.stop()
        name = f"steps_{self.first}-{self.traced}_rank_{self.rank}.json.gz"
        _write(self.folder / name, "trace", lambda path: write_trace(profile, path))


def write_trace(profile: Any, path: Path) -> None:
    """Writes the Chrome trace of a stopped torch.profiler.profile to `path`, compressed."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "trace.json")
        profile.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, 1 << 20)


def record_memory() -> None:
    """Begins to remember this rank's allocations on the device, with the Python stacks that made them."""
    torch.cuda.memory._record_memory_history("all", stacks="python", max_entries=MAX_ENTRIES)


def write_snapshot(folder: Path, name: str) -> None:
    """Writes what `record_memory` has remembered to `folder`/`name`.pickle."""
    _write(folder / f"{name}.pickle", "memory snapshot", lambda path: torch.cuda.memory._dump_snapshot(str(path)))


def _write(path: Path, kind: str, write: Callable[[Path], None]) -> None:
    """Writes a file whole, and logs where it is or why it is not."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        write(partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        logger.warning("%s cannot be written, training goes on: %s", path, describe_os_error(error) or error)
        with suppress(OSError):
            partial.unlink()
        return
    viewer = "https://ui.perfetto.dev" if kind == "trace" else "https://pytorch.org/memory_viz"
    logger.info("%s: %s, %.1f MB; %s shows it", kind, path, path.stat().st_size / 1e6, viewer)
