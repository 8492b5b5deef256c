"""Everything that a run records in SAVE_CHECKPOINT_PATH and with Weights & Biases and SwanLab, on rank 0."""

import logging
import secrets
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import one_line
from common.training.planning.description import describe
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings
from common.training.tracking.best_losses import BestLosses
from common.training.tracking.log_file import log_file
from common.training.tracking.metrics_file import MetricsFile
from common.training.tracking.run_record import RunRecord
from common.training.tracking.swanlab import SwanlabTracker, check_swanlab
from common.training.tracking.tensorboard import TensorBoardTracker, writes_tensorboard
from common.training.tracking.wandb import WandbTracker, check_wandb


class Tracker:
    """Passes metrics on to every recorder; without recorders, as on ranks above 0, it does nothing."""

    def __init__(self, best: BestLosses) -> None:
        self.iteration, self.best = 0, best
        self._recorders: list[Callable[[int, dict[str, float]], None]] = []

    def add(self, recorder: Callable[[int, dict[str, float]], None]) -> None:
        """Also passes metrics on to `recorder`."""
        self._recorders.append(recorder)

    def log(self, iteration: int, **metrics: float) -> None:
        """Records the metrics of `iteration`."""
        self.iteration = iteration
        for record in self._recorders:
            record(iteration, metrics)


@contextmanager
def tracking(plan: Plan, rank: int) -> Iterator[Tracker]:
    """The tracker of a run, and its records of how the block began and ended."""
    tracker = Tracker(BestLosses(plan, rank))  # before this start is in the records
    if rank:
        yield tracker
        return
    settings = plan.settings
    folder = Path(settings.save_checkpoint_path)
    with log_file(folder, lambda: describe(plan)) as log:  # the launcher has logged the plan on the terminal
        record = RunRecord(plan)
        tracker.iteration = plan.progress.iteration
        tracker.add(MetricsFile(folder, record.start).log)
        if writes_tensorboard(settings):
            tracker.add(TensorBoardTracker(folder, plan.progress.iteration + 1).log)
        services: list[WandbTracker | SwanlabTracker] = []
        if settings.wandb_project:
            services.append(WandbTracker(settings, record.shared("wandb_run_id", secrets.token_hex(4))))
        if settings.swanlab_project:
            services.append(SwanlabTracker(settings, record.shared("swanlab_run_id", secrets.token_hex(4))))
        for service in services:
            tracker.add(service.log)
        reason = "killed"
        try:
            yield tracker
            reason = "complete" if tracker.iteration >= plan.train_iters else "stopped"
        except BaseException as error:
            reason = one_line(error) or "".join(traceback.format_exception(error))
            log.emit(logging.makeLogRecord({"msg": reason}))  # on the terminal the rank's exit reports it
            raise
        finally:
            record.end(tracker.iteration, reason)
            for service in services:
                service.finish(failed=reason not in ("complete", "stopped"))


def check_tracking(settings: TrainSettings) -> None:
    """Raises KitError if a tracker is requested whose package is missing."""
    check_wandb(settings)
    check_swanlab(settings)
    writes_tensorboard(settings)
