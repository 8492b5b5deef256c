"""Experiment tracking with Weights & Biases, if WANDB_PROJECT is set."""

from dataclasses import asdict
from typing import Any

from common.errors import KitError
from common.training.settings import TrainSettings


class WandbTracker:
    """Logs metrics from rank 0 if WANDB_PROJECT is set; does nothing otherwise.

    Leaving its `with` block finishes the run on wandb's side; wandb would do so as the process ends, which a failing
    rank does without running exit handlers.
    """

    def __init__(self, settings: TrainSettings, rank: int) -> None:
        self.run: Any = None
        if settings.wandb_project and rank == 0:
            self.run = _wandb().init(
                project=settings.wandb_project,
                name=settings.wandb_exp_name,
                mode=settings.wandb_mode,
                dir=settings.wandb_save_path,
                config=asdict(settings),
            )

    def log(self, iteration: int, **metrics: float) -> None:
        """Logs the metrics of `iteration`."""
        if self.run is not None:
            self.run.log(metrics, step=iteration)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if kind is None else 1)


def check_tracking(settings: TrainSettings) -> None:
    """Raises KitError if WANDB_PROJECT is set and wandb is not installed."""
    if settings.wandb_project:
        _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise KitError(
            "WANDB_PROJECT is set, but wandb is not installed: pip install wandb, or leave it empty"
        ) from error
    return wandb
