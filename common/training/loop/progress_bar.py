"""The progress bar in a terminal, and log lines that leave it intact."""

import sys

import torch.distributed as dist
from tqdm import tqdm

from common.log import logger
from common.training.planning.plan import Plan, Progress


def progress_bar(plan: Plan, progress: Progress) -> tqdm:
    """A bar over the run's steps, shown on rank 0 in a terminal."""
    shown = dist.get_rank() == 0 and sys.stderr.isatty()
    return tqdm(total=plan.train_iters, initial=progress.iteration, disable=not shown, unit="step", leave=False)


def log_beside_bar(message: str, *args: object) -> None:
    """Logs a line while the bar is hidden."""
    with tqdm.external_write_mode():
        logger.info(message, *args)
