"""One optimizer step.

If the loss or a gradient is not finite on some rank, all ranks skip the update: bf16 has no loss scaler that would skip
it, and Megatron-Core would apply it (prepare_grads in its optimizer/optimizer.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from common.data.dataset.data_loader import Batch
from common.engine.optimizer import clip_gradients, reduce_grad_norm
from common.log import listed
from common.training.loop.forward_step import forward_backward, sum_reporting_losses
from common.training.planning.plan import Plan
from common.training.state.optimizer import distributed_optimizers
from common.training.state.step_times import FORWARD_BACKWARD, OPTIMIZER
from common.training.state.training_state import TrainingState


@dataclass(frozen=True)
class StepResult:
    """The result of a step; the same on every rank, except for `reporting_loss`.

    reporting_loss: this rank's, float64, see `forward_step.sum_reporting_losses`; zeros before the last pipeline stage.
    grad_norm: before clipping. skipped: why the update was skipped, "" if it was not. stop: any rank requested a stop.
    """

    reporting_loss: torch.Tensor
    grad_norm: float
    skipped: str
    stop: bool


def train_step(
    plan: Plan, training_state: TrainingState, data_iterators: list[Iterator[Batch]], consumed_samples: int, stop: bool
) -> StepResult:
    """One optimizer step, on the global batch that begins at sample `consumed_samples`.

    stop: whether this rank requests a stop; the step is completed in any case.
    """
    for chunk in training_state.model:
        chunk.zero_grad_buffer()
    training_state.optimizer.zero_grad()
    training_state.times.begin(FORWARD_BACKWARD)
    reporting_losses = forward_backward(plan, training_state, data_iterators, forward_only=False)
    training_state.times.begin(OPTIMIZER)
    reporting_loss = sum_reporting_losses(plan, reporting_losses)
    training_state.heartbeat.beat("optimizer step")
    training_state.optimizer.prepare_grads()
    grad_norm, stop, loss_is_finite = agree(training_state, reporting_loss, stop)
    skipped = ""
    if not (loss_is_finite and math.isfinite(grad_norm)):
        skipped = describe_non_finite(plan, training_state, reporting_losses, grad_norm, consumed_samples)
    elif plan.settings.skip_grad_norm is not None and grad_norm > plan.settings.skip_grad_norm:
        skipped = f"the gradient norm {grad_norm:.4g} is above SKIP_GRAD_NORM={plan.settings.skip_grad_norm:g}"
    else:
        for part in distributed_optimizers(training_state.optimizer):
            clip_gradients(part, grad_norm)
        training_state.optimizer.step_with_ready_grads()
    training_state.scheduler.step(increment=plan.settings.global_batch_size)
    training_state.times.end()
    return StepResult(reporting_loss, grad_norm, skipped, stop)


def agree(training_state: TrainingState, reporting_loss: torch.Tensor, stop: bool) -> tuple[float, bool, bool]:
    """(gradient norm of the model, whether any rank requests a stop, whether the loss is finite on every rank).

    A collective call. The norm is over all parameters, as in Megatron-Core's ChainedOptimizer.step.
    """
    bad = ~torch.isfinite(reporting_loss[:1])
    flags = torch.cat([torch.full_like(reporting_loss[:1], float(stop)), bad]).float()
    reduced = [reduce_grad_norm(part, flags) for part in distributed_optimizers(training_state.optimizer)]
    norms, (any_stop, any_bad) = [norm for norm, _ in reduced], reduced[0][1]
    return norms[0] if len(norms) == 1 else math.hypot(*norms), any_stop > 0, not any_bad


def any_rank(stop: bool, device: torch.device) -> bool:
    """Whether `stop` on any rank; a collective call."""
    flag = torch.full((1,), int(stop), dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def describe_non_finite(
    plan: Plan,
    training_state: TrainingState,
    reporting_losses: list[torch.Tensor],
    grad_norm: float,
    consumed_samples: int,
) -> str:
    """The ranks and samples whose loss or gradients are not finite, for the log; a collective call.

    A rank's gradient buffer is its own except for the shard that is reduced to it, so gradients that went wrong on
    another rank show in that shard of every replica.
    """
    size, dp = plan.settings.micro_batch_size, plan.sizes.dp
    first = consumed_samples + parallel_state.get_data_parallel_rank() * size
    starts = [first + number * size * dp for number, each in enumerate(reporting_losses) if not torch.isfinite(each[0])]
    buffers = [buffer.grad_data for chunk in training_state.model for buffer in chunk.buffers]
    gradients_are_finite = all(bool(torch.isfinite(each).all()) for each in buffers)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (starts, gradients_are_finite))
    samples = sorted({start + i for starts, _ in ranks for start in starts for i in range(size)})
    loss_ranks = [rank for rank, (starts, _) in enumerate(ranks) if starts]
    gradient_ranks = [rank for rank, (_, finite) in enumerate(ranks) if not finite]
    last = consumed_samples + plan.settings.global_batch_size - 1
    where = f"samples {consumed_samples} to {last}, all with a finite loss"
    if samples:
        where = f"the loss is not finite on rank {listed(loss_ranks)}, in samples {listed(samples)}"
    return f"gradient norm {grad_norm:g}: {where}; gradients are not finite on rank {listed(gradient_ranks)}"
