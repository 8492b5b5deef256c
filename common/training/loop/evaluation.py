"""Evaluation: the loss on the validation samples.

Without names, an evaluation takes EVAL_ITERS global batches. Sets with names (NamedDatasets) are each taken whole: the
last batch of a set has as many micro-batches as its samples need, filled up with samples that have no loss, so that the
sums of losses and of supervised tokens over all ranks, and their quotient, are those of each sample counted once.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from common.data.dataset.data_loader import Batch
from common.data.dataset.named_datasets import ALL, NamedDatasets
from common.log import GREEN, PLAIN, logger
from common.training.loop.forward_step import Means, forward_backward, mean_losses, sum_reporting_losses
from common.training.loop.train_step import any_rank
from common.training.planning.plan import Plan
from common.training.state.training_state import TrainingState
from common.training.tracking.best_losses import metric_of
from common.training.tracking.records import VALIDATION_ACCURACY

Results = dict[str, Means]  # by the name of a set; under "" the means over all


def eval_batches(plan: Plan) -> Iterator[tuple[str, int]]:
    """(name of its set, micro-batches of each rank) of each batch of one evaluation."""
    settings, valid = plan.settings, plan.valid
    assert valid
    if not isinstance(valid, NamedDatasets):
        number = min(settings.eval_iters, max(1, valid.samples_per_epoch // settings.global_batch_size))
        yield from [("", plan.num_microbatches)] * number
        return
    for name, positions in valid.positions.items():
        left = positions // (settings.micro_batch_size * plan.sizes.dp)
        while left:
            number = min(left, plan.num_microbatches)
            yield name, number
            left -= number


@contextmanager
def evaluation_mode(training_state: TrainingState) -> Iterator[None]:
    """The model in evaluation mode and without gradients in the block, with the parameters of the last step."""
    overlap = training_state.model[0].ddp_config.overlap_param_gather
    for chunk in training_state.model:
        if overlap:  # else the forward pass would use parameters from before the last step
            chunk.disable_forward_pre_hook()
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in training_state.model:
        chunk.train()
        if overlap:
            chunk.enable_forward_pre_hook()


def evaluate(
    plan: Plan, training_state: TrainingState, data_iterators: list[Iterator[Batch]], should_stop: Callable[[], bool]
) -> Results | None:
    """The mean losses per supervised token or pair; None if `should_stop` interrupted the evaluation on any rank."""
    totals: dict[str, torch.Tensor] = {}
    with evaluation_mode(training_state):
        for name, number in eval_batches(plan):
            reports = forward_backward(
                plan, training_state, data_iterators, forward_only=True, num_microbatches=number
            )  # fmt: skip
            totals[name] = totals.get(name, 0) + sum_reporting_losses(plan, reports)
            stop = any_rank(should_stop(), totals[name].device)
            if stop:
                break
    return None if stop else _means(totals)


def _means(totals: dict[str, torch.Tensor]) -> Results:
    """The means of each of `totals`, this rank's reporting losses, and of their sum under ""."""
    rows = {"": torch.stack([*totals.values()]).sum(0), **totals}
    return dict(zip(rows, mean_losses(torch.stack([*rows.values()])), strict=True))


def validation_metrics(results: Results) -> dict[str, float]:
    """The metrics of `evaluate`'s results by name: the losses, and of preferences the accuracies."""
    losses = {metric_of(name): means.loss for name, means in results.items()}
    accuracies = {
        metric_of(name, VALIDATION_ACCURACY): means.of_pairs["accuracy"]
        for name, means in results.items()
        if means.of_pairs
    }
    return losses | accuracies


def log_evaluation(plan: Plan, iteration: int, results: Results | None, best: set[str]) -> None:
    """Logs the result of `evaluate` at `iteration`. best: the sets whose loss is the lowest so far."""
    if results is None:
        logger.info("validation at iteration %d interrupted: stop requested", iteration)
        return
    heading = f"validation at iteration {iteration}"
    sizes = plan.valid.sizes if isinstance(plan.valid, NamedDatasets) else {}
    width = max(len(heading), *(len(name) + 2 for name in sizes)) if sizes else 0
    evaluated = plan.settings.global_batch_size * sum(1 for _ in eval_batches(plan))
    rows = {"": (heading, sum(sizes.values()) or evaluated)} | {name: (f"  {name}", sizes[name]) for name in sizes}
    for name, (label, number) in rows.items():
        means, every = results[name], f"{ALL} " if sizes and not name else ""
        quality = f"perplexity {math.exp(min(20.0, means.loss)):.2f}"
        if means.of_pairs:
            quality = f"accuracy {means.of_pairs['accuracy']:.1%}"
        fields = [f"{label:{width}}", f"loss {means.loss:.6f}", quality]
        fields += [f"{every}{number} samples", *(["best"] if name in best else [])]
        logger.info("%s", "  ".join(fields), extra={"style": GREEN if name in best else PLAIN})
