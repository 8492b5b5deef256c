"""The progress bar of a run in a terminal."""

import sys

import torch.distributed as dist
from tqdm import tqdm

from common.training.planning.plan import Plan, Progress

# Without tqdm's own estimate: the time left in the log also counts evaluation and saving.
FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}]"


def progress_bar(plan: Plan, progress: Progress) -> tqdm:
    """A bar over the run's steps, shown on rank 0 in a terminal; `common.log` writes its lines above it."""
    return tqdm(
        total=plan.train_iters,
        initial=progress.iteration,
        disable=dist.get_rank() != 0 or not sys.stderr.isatty(),
        unit="step",
        leave=False,
        dynamic_ncols=True,
        bar_format=FORMAT,
    )
