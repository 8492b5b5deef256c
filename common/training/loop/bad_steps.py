"""Steps whose update was skipped: counted, and the end of a run after MAX_BAD_STEPS in a row."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.checkpoint.formats.checkpoint_paths import iteration_dir, read_tracker
from common.log import logger
from common.training.launching.process_group import fail_together
from common.training.loop.train_step import StepResult
from common.training.planning.plan import Plan


class BadSteps:
    """The number of skipped steps: `in_a_row` up to now, and `total` of this run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.in_a_row = self.total = 0

    def count(self, iteration: int, result: StepResult) -> None:
        """Counts the step `iteration`, and logs why it was skipped."""
        if not result.skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        logger.info("iteration %d skipped: %s (%d in all)", iteration, result.skipped, self.total)

    def check(self, iteration: int) -> None:
        """Raises KitError after MAX_BAD_STEPS bad steps in a row, or if the run's last two were bad.

        Two in a row point to the weights rather than to a sample, and no step is left that would show it.
        """
        limit = self.plan.settings.max_bad_steps
        if limit and (self.in_a_row >= limit or (self.in_a_row > 1 and iteration == self.plan.train_iters)):
            fail_together(
                f"{self.in_a_row} steps in a row were skipped, the last at iteration {iteration}, and none of them was"
                f" saved: MAX_BAD_STEPS={limit}; {newest_checkpoint(self.plan)}; lower LR, raise LR_WARMUP_ITERS, or"
                " inspect the samples that are named above with `python -m common.preprocess show`"
            )


def check_weights(model: list[Any]) -> None:
    """Raises KitError unless all weights are finite; a collective call."""
    finite = [torch.isfinite(param).all() for chunk in model for param in chunk.parameters()]
    bad = (~torch.stack(finite).all()).to(torch.int32)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if bad.item():
        fail_together("the weights are not finite, so they are not saved: resume from the newest checkpoint, lower LR")


def newest_checkpoint(plan: Plan) -> str:
    """The checkpoint that the same command would resume from, as part of an error message."""
    folder = Path(plan.settings.save_checkpoint_path)
    iteration = read_tracker(folder)
    return f"the newest checkpoint is {iteration_dir(folder, iteration)}" if iteration else f"none is in {folder} yet"
