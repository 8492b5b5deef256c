"""Evaluation: the loss on the validation samples."""

import math
from collections.abc import Callable, Iterator

import torch

from common.data.dataset.data_loader import Batch
from common.training.loop.forward_step import forward_backward, mean_loss, sum_reporting_losses
from common.training.loop.progress_bar import log_beside_bar
from common.training.loop.train_step import reduce_flags
from common.training.planning.plan import Plan
from common.training.state.training_state import TrainingState


def num_eval_batches(plan: Plan) -> int:
    """The global batches of one evaluation: EVAL_ITERS, or fewer if the validation samples do not fill them."""
    assert plan.valid
    return min(plan.settings.eval_iters, max(1, plan.valid.samples_per_epoch // plan.settings.global_batch_size))


@torch.no_grad()
def evaluate(
    plan: Plan,
    training_state: TrainingState,
    data_iterators: list[Iterator[Batch]],
    num_batches: int,
    should_stop: Callable[[], bool],
) -> float | None:
    """The mean loss per token over `num_batches` global batches; None if `should_stop` interrupted it on any rank."""
    overlap = training_state.model[0].ddp_config.overlap_param_gather
    for chunk in training_state.model:
        if overlap:  # else the forward pass would use parameters from before the last step
            chunk.disable_forward_pre_hook()
        chunk.eval()
    total, stop = sum_reporting_losses(plan, []), False
    for _ in range(num_batches):
        total += sum_reporting_losses(plan, forward_backward(plan, training_state, data_iterators, forward_only=True))
        stop, _ = reduce_flags(total, should_stop())
        if stop:
            break
    for chunk in training_state.model:
        chunk.train()
        if overlap:
            chunk.enable_forward_pre_hook()
    return None if stop else mean_loss(total)[0]


def log_evaluation(plan: Plan, iteration: int, loss: float | None) -> None:
    """Logs the result of `evaluate` at `iteration`."""
    if loss is None:
        log_beside_bar("validation at iteration %d interrupted: stop requested", iteration)
        return
    num_samples = num_eval_batches(plan) * plan.settings.global_batch_size
    log_beside_bar(
        "validation at iteration %d | loss %.6f | perplexity %.3f | %d samples",
        iteration, loss, math.exp(min(20.0, loss)), num_samples,
    )  # fmt: skip
