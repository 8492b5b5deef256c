"""Experiment tracking with Weights & Biases, if WANDB_PROJECT is set."""

from dataclasses import asdict
from typing import Any

from common.training.settings import TrainSettings
from common.training.tracking.service import import_client


class WandbTracker:
    """Logs metrics to the run `run_id`, which each start of a run goes on with."""

    def __init__(self, settings: TrainSettings, run_id: str) -> None:
        self._run: Any = import_client("wandb", "WANDB_PROJECT").init(
            project=settings.wandb_project,
            name=settings.wandb_exp_name,
            mode=settings.wandb_mode,
            dir=settings.wandb_save_path,
            id=run_id,
            resume="allow",
            config=asdict(settings),
        )

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of `iteration`."""
        self._run.log(metrics, step=iteration)

    def finish(self, *, failed: bool) -> None:
        """Finishes the run on wandb's side, since a failing rank skips the exit handler that would."""
        self._run.finish(exit_code=int(failed))


def check_wandb(settings: TrainSettings) -> None:
    """Raises KitError if WANDB_PROJECT is set and wandb is not installed."""
    if settings.wandb_project:
        import_client("wandb", "WANDB_PROJECT")
