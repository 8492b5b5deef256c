"""One optimizer step, and one evaluation: micro-batches through Megatron-Core's schedule, the loss over its tokens.

A step whose loss or gradient is not finite on some rank changes nothing on any: bf16 has no loss scaler that would skip
it, and Megatron-Core applies it (prepare_grads in its optimizer/optimizer.py).

Letters: b micro-batch, s sequence.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from common.data.dataset.data_loader import Batch
from common.engine.optimizer import clip_gradients
from common.log import listed
from common.model.layers.attention import block_causal_mask, joined_rows
from common.training.planning.plan import Plan
from common.training.state.training_state import TrainingState, optimizer_parts


@dataclass(frozen=True)
class StepResult:
    """What one step gave; the same on every rank but for `report`.

    report: this rank's [sum of losses, number of tokens] float64; zeros but on the last pipeline stage.
    grad_norm: before clipping. skipped: why the step changed nothing, "" if it did. stop: a rank was asked to stop.
    """

    report: torch.Tensor
    grad_norm: float
    skipped: str
    stop: bool


def sum_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the supervised tokens' losses, their number as int32, [sum, number] for the log) of one micro-batch.

    Megatron-Core divides the summed gradients by the number over the global batch (calculate_per_token_loss), so the
    loss is the mean over its supervised tokens whatever TP, PP, DP and the micro-batch are; LossWeights does it where
    weights are not whole. losses, multiplied by loss_mask already, and loss_mask are [b, s] float32.
    """
    total = losses.sum()
    number = loss_mask.sum()
    # A copy: the schedule scales the first value in place.
    report = torch.stack([total.detach(), number]).clone()
    return total, number.round().to(torch.int32), report


def forward_step(
    plan: Plan, training_state: TrainingState
) -> Callable[[Iterator[Batch], Any], tuple[torch.Tensor, Any]]:
    """The function that Megatron-Core's schedule calls for each micro-batch."""
    device = torch.device(plan.platform.device)

    def run(data: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        training_state.heartbeat.beat("reading data")
        rows = next(data)
        training_state.heartbeat.beat("computing")
        batch, apart = prepared(plan, rows, device)
        positions = torch.arange(batch["tokens"].shape[1], device=device).expand_as(batch["tokens"])
        mask = apart.pop("attention_mask", None)
        output = model(batch["tokens"], positions, mask, labels=batch["labels"], loss_mask=batch["loss_mask"], **apart)

        def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if training_state.loss_weights and torch.is_grad_enabled():
                training_state.loss_weights.add(batch["loss_mask"].sum())
            return sum_loss(batch["loss_mask"], losses)

        return output, loss_of

    return run


def prepared(plan: Plan, rows: Batch, device: torch.device) -> tuple[Batch, dict[str, Any]]:
    """(tokens, labels and loss_mask on `device`, what keeps their segments apart) of the rows [b, s] that were read.

    Nothing keeps them apart where `rows` has no segment_ids. Local layers get an attention mask; Transformer Engine's
    get the segments' bounds, and the rows joined to [1, b * s]. With context parallelism this rank's part of s is left.
    """
    segments = rows.pop("segment_ids", None)
    if plan.sizes.cp > 1:
        rank = parallel_state.get_context_parallel_rank()
        rows = {name: context_parallel_part(tensor, plan.sizes.cp, rank) for name, tensor in rows.items()}
    apart: dict[str, Any] = {}
    if segments is not None and plan.joins_rows:
        rows = {name: tensor.reshape(1, -1) for name, tensor in rows.items()}
        bounds = joined_rows(segments)
        bounds.cu_seqlens_q = bounds.cu_seqlens_kv = bounds.cu_seqlens_q.to(device, non_blocking=True)
        apart["packed_seq_params"] = bounds
    elif segments is not None:
        apart["attention_mask"] = block_causal_mask(segments.to(device, non_blocking=True))
    if device.type == "cuda":  # here, and not by the loader: it would begin CUDA before its processes are forked
        rows = {name: tensor.pin_memory() for name, tensor in rows.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in rows.items()}, apart


def context_parallel_part(rows: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """[b, s / size] of rows [b, s]: of 2 * size equal pieces of s the one at `rank` and the one as far from the end.

    So each rank has as much of causal attention to do as the others; Transformer Engine's attention expects this order
    (get_batch_on_this_cp_rank in Megatron-Core's utils.py).
    """
    pieces = rows.unflatten(1, (2 * size, -1))
    return torch.cat([pieces[:, rank], pieces[:, 2 * size - 1 - rank]], dim=1)


def run_microbatches(
    plan: Plan, training_state: TrainingState, data: list[Iterator[Batch]], forward_only: bool
) -> list[torch.Tensor]:
    """[sum of losses, number of tokens] float32 of each of this rank's micro-batches; nothing but on the last stage."""
    rows, seq_length = plan.settings.micro_batch_size, plan.settings.seq_length
    if plan.joins_rows:
        rows, seq_length = 1, rows * seq_length
    reports: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step(plan, training_state),
        data_iterator=data if len(data) > 1 else data[0],
        model=training_state.model,
        num_microbatches=plan.num_microbatches,
        seq_length=seq_length,
        micro_batch_size=rows,
        decoder_seq_length=seq_length,
        forward_only=forward_only,
    )
    return reports


def total_of(plan: Plan, reports: list[torch.Tensor]) -> torch.Tensor:
    """The sum of `reports` as float64; zeros where there are none."""
    total = torch.zeros(2, dtype=torch.float64, device=torch.device(plan.platform.device))
    return total + torch.stack(reports).double().sum(0) if reports else total


def train_step(
    plan: Plan, training_state: TrainingState, data: list[Iterator[Batch]], consumed_samples: int, stop: bool
) -> StepResult:
    """One step of the optimizer on the samples from `consumed_samples` on.

    stop: whether this rank is asked to stop; the step is done all the same.
    """
    for chunk in training_state.model:
        chunk.zero_grad_buffer()
    training_state.optimizer.zero_grad()
    reports = run_microbatches(plan, training_state, data, forward_only=False)
    report = total_of(plan, reports)
    training_state.heartbeat.beat("the optimizer's step")
    training_state.optimizer.prepare_grads()
    grad_norm = gradient_norm(training_state)
    stop, loss_is_finite = agree_on_step(plan, report, stop)
    skipped = ""
    if not (loss_is_finite and math.isfinite(grad_norm)):
        skipped = what_is_not_finite(plan, training_state, reports, grad_norm, consumed_samples)
    elif plan.settings.skip_grad_norm is not None and grad_norm > plan.settings.skip_grad_norm:
        skipped = f"the gradient norm {grad_norm:.4g} is above SKIP_GRAD_NORM={plan.settings.skip_grad_norm:g}"
    else:
        for part in optimizer_parts(training_state.optimizer):
            clip_gradients(part, grad_norm)
        training_state.optimizer.step_with_ready_grads()
    training_state.scheduler.step(increment=plan.settings.global_batch_size)
    return StepResult(report, grad_norm, skipped, stop)


def gradient_norm(training_state: TrainingState) -> float:
    """The norm over all parameters of the model, as Megatron-Core's ChainedOptimizer.step computes it."""
    norms = [float(part.get_grad_norm()) for part in optimizer_parts(training_state.optimizer)]
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


def agree_on_step(plan: Plan, report: torch.Tensor, stop: bool) -> tuple[bool, bool]:
    """(whether any rank is to stop, whether the loss is finite on every rank); a collective call."""
    bad = ~torch.isfinite(report[0])
    flags = torch.stack([torch.tensor(stop, device=report.device), bad]).to(torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    any_stop, any_bad = flags.tolist()
    return bool(any_stop), not any_bad


def what_is_not_finite(
    plan: Plan, training_state: TrainingState, reports: list[torch.Tensor], grad_norm: float, consumed_samples: int
) -> str:
    """Where a step went wrong: ranks and sample numbers; a collective call.

    A rank's gradients are its own but for the part that is reduced to it, so those that went wrong elsewhere show in
    that part of every replica.
    """
    size, dp = plan.settings.micro_batch_size, plan.sizes.dp
    first = consumed_samples + parallel_state.get_data_parallel_rank() * size
    starts = [first + number * size * dp for number, each in enumerate(reports) if not torch.isfinite(each[0])]
    buffers = [buffer.grad_data for chunk in training_state.model for buffer in chunk.buffers]
    gradients = all(bool(torch.isfinite(each).all()) for each in buffers)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (starts, gradients))
    samples = sorted({start + i for starts, _ in found for start in starts for i in range(size)})
    of_loss = [rank for rank, (starts, _) in enumerate(found) if starts]
    of_gradients = [rank for rank, (_, finite) in enumerate(found) if not finite]
    last = consumed_samples + plan.settings.global_batch_size - 1
    where = f"samples {consumed_samples} to {last}, of which each micro-batch's loss is finite"
    if samples:
        where = f"the loss is not finite on rank {listed(of_loss)}, in samples {listed(samples)}"
    return f"gradient norm {grad_norm:g}: {where}; gradients are not finite on rank {listed(of_gradients)}"


def mean_loss(report: torch.Tensor) -> float:
    """The mean loss over all ranks' tokens; `report` is this rank's [sum, tokens]. A collective call."""
    report = report.clone()
    dist.all_reduce(report, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(report, group=parallel_state.get_pipeline_model_parallel_group())
    total, number = report.tolist()
    return total / number if number else float("nan")


@torch.no_grad()
def evaluate(
    plan: Plan, training_state: TrainingState, data: list[Iterator[Batch]], iterations: int, stop: Callable[[], bool]
) -> float | None:
    """The mean loss over `iterations` global batches of `data`, weighted by tokens; None if a `stop` ended it."""
    overlap = training_state.model[0].ddp_config.overlap_param_gather
    for chunk in training_state.model:
        if overlap:  # else the forward pass would use parameters from before the last step
            chunk.disable_forward_pre_hook()
        chunk.eval()
    total, stopped = total_of(plan, []), False
    for _ in range(iterations):
        total += total_of(plan, run_microbatches(plan, training_state, data, forward_only=True))
        stopped, _ = agree_on_step(plan, total, stop())
        if stopped:
            break
    for chunk in training_state.model:
        chunk.train()
        if overlap:
            chunk.enable_forward_pre_hook()
    return None if stopped else mean_loss(total)
