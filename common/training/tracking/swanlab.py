"""Experiment tracking with SwanLab, if SWANLAB_PROJECT is set."""

from dataclasses import asdict
from typing import Any

from common.training.settings import TrainSettings
from common.training.tracking.service import import_client


class SwanlabTracker:
    """Logs metrics to the run `run_id`, which each start of a run goes on with, where SwanLab's mode can."""

    def __init__(self, settings: TrainSettings, run_id: str) -> None:
        self._run: Any = import_client("swanlab", "SWANLAB_PROJECT").init(
            project=settings.swanlab_project,
            name=settings.swanlab_exp_name,
            mode=settings.swanlab_mode,
            log_dir=settings.swanlab_save_path,
            id=run_id,
            resume="allow",
            config=asdict(settings),
        )

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of `iteration`."""
        self._run.log(metrics, step=iteration)

    def finish(self, *, failed: bool) -> None:
        """Finishes the run on SwanLab's side, since a failing rank skips the exit handler that would."""
        state = {"state": "crashed", "error": "see log.txt"} if failed else {"state": "success"}
        self._run.finish(**state)


def check_swanlab(settings: TrainSettings) -> None:
    """Raises KitError if SWANLAB_PROJECT is set and swanlab is not installed."""
    if settings.swanlab_project:
        import_client("swanlab", "SWANLAB_PROJECT")
