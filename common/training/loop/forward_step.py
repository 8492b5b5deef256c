"""Forward and backward of a step's micro-batches through Megatron-Core's schedule, and the loss over their tokens.

Letters: b micro-batch, s sequence.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from common.data.dataset.data_loader import Batch
from common.training.loop.batch import prepare_batch
from common.training.loop.preference_step import NUM_REPORTED, LossFunc, pair_metrics, preference_objective
from common.training.planning.plan import Plan
from common.training.state.training_state import TrainingState

# From a micro-batch on the CPU, of which it may take entries that the model does not need, to its loss_func.
Objective = Callable[[Batch], LossFunc]


def forward_step(
    plan: Plan, training_state: TrainingState, objective: Objective | None = None
) -> Callable[[Iterator[Batch], Any], tuple[torch.Tensor, Any]]:
    """The forward_step_func that Megatron-Core's schedule calls for each micro-batch; objective: TRAIN_MODE's."""
    objective = objective or objective_of(plan, training_state)
    device = torch.device(plan.platform.device)

    def forward_step_func(data_iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        training_state.heartbeat.beat("reading data")
        began = time.perf_counter()
        rows = next(data_iterator)
        training_state.times.add_reading(time.perf_counter() - began)
        training_state.heartbeat.beat("computing")
        loss_func = objective(rows) if "labels" in rows else no_loss
        batch, attention = prepare_batch(plan, rows, device)
        tokens, labels, loss_mask = (batch.get(name) for name in ("tokens", "labels", "loss_mask"))
        positions = None if tokens is None else torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        mask = attention.pop("attention_mask", None)
        output = model(tokens, positions, mask, labels=labels, loss_mask=loss_mask, **attention)
        return output, lambda losses: loss_func(losses, batch["loss_mask"])

    return forward_step_func


def no_loss(losses: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss_func before the last stage, where the schedule calls none."""
    raise AssertionError("a micro-batch without labels has no loss")


def objective_of(plan: Plan, training_state: TrainingState) -> Objective:
    """The objective of TRAIN_MODE."""
    if plan.settings.train_mode == "dpo":
        return preference_objective(plan.settings, training_state.references)

    def token_objective(rows: Batch) -> LossFunc:
        num_padding = count_padding(rows)

        def loss_func(losses: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if training_state.loss_weights and torch.is_grad_enabled():
                training_state.loss_weights.add(loss_mask.sum())
            return sum_loss(loss_mask, losses, num_padding)

        return loss_func

    return token_objective


def count_padding(rows: Batch) -> int:
    """The positions of a micro-batch that are padding, taken out of it; on the other ranks of a CP group none."""
    number = rows.pop("num_padding", None)
    return 0 if number is None or parallel_state.get_context_parallel_rank() else int(number.sum())


def sum_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor, num_padding: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the supervised tokens' losses, their number as int32, reporting loss [3]) of one micro-batch.

    The reporting loss holds that sum, that number, and `num_padding`.

    Megatron-Core divides the summed gradients by the number over the global batch (calculate_per_token_loss), so the
    loss is the mean over its supervised tokens at any TP, PP, DP and micro-batch size; LossWeights does so where
    weights are not whole numbers. losses, already multiplied by loss_mask, and loss_mask are [b, s] float32.
    """
    total = losses.sum()
    number = loss_mask.sum()
    # A copy: the schedule scales the first value in place.
    reporting_loss = torch.stack([total.detach(), number, torch.full_like(number, num_padding)]).clone()
    return total, number.round().to(torch.int32), reporting_loss


def forward_backward(
    plan: Plan,
    training_state: TrainingState,
    data_iterators: list[Iterator[Batch]],
    *,
    forward_only: bool,
    num_microbatches: int | None = None,
    objective: Objective | None = None,
) -> list[Any]:
    """The reporting loss of each micro-batch, float32 [3], see `sum_loss`; empty before the last stage.

    With preferences it is that of `preference_objective`. num_microbatches: that this rank runs; None: its own of one
    global batch. objective: instead of TRAIN_MODE's; what its loss_func reports is returned.
    """
    rows, seq_length = plan.settings.micro_batch_size * plan.settings.rows_per_sample, plan.settings.seq_length
    if plan.packed_sequences:
        rows, seq_length = 1, rows * seq_length
    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step(plan, training_state, objective),
        data_iterator=data_iterators if len(data_iterators) > 1 else data_iterators[0],
        model=training_state.model,
        num_microbatches=num_microbatches or plan.num_microbatches,
        seq_length=seq_length,
        micro_batch_size=rows,
        decoder_seq_length=seq_length,
        forward_only=forward_only,
    )
    return reports


def sum_reporting_losses(plan: Plan, reporting_losses: list[torch.Tensor]) -> torch.Tensor:
    """Their sum as float64 on the device, [3], with preferences [NUM_REPORTED]; zeros for none."""
    size = NUM_REPORTED if plan.settings.train_mode == "dpo" else 3
    total = torch.zeros(size, dtype=torch.float64, device=torch.device(plan.platform.device))
    return total + torch.stack(reporting_losses).double().sum(0) if reporting_losses else total


class Means(NamedTuple):
    """The mean loss over the supervised tokens of all ranks, nan without any; their number, and that of padding.

    With preferences the loss is the mean over pairs, and `of_pairs` holds their metrics, see `pair_metrics`.
    """

    loss: float
    num_tokens: float
    num_padding: float
    of_pairs: dict[str, float] = {}


def mean_loss(reporting_loss: torch.Tensor) -> Means:
    """The means of all ranks; reporting_loss: this rank's. A collective call."""
    (means,) = mean_losses(reporting_loss[None])
    return means


def mean_losses(reporting_losses: torch.Tensor) -> list[Means]:
    """`mean_loss` of each row of [n, 3] or [n, NUM_REPORTED], by the same two collective calls for all."""
    sums = reporting_losses.clone()
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return [_means(row) for row in sums.tolist()]


def _means(sums: list[float]) -> Means:
    total, number, padding, *more = sums
    loss = total / number if number else float("nan")
    return Means(loss, more[0], padding, pair_metrics(sums)) if more else Means(loss, number, padding)
