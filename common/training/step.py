"""One optimizer step, and one evaluation: micro-batches through Megatron-Core's schedule, the loss over its tokens.

Letters: b micro-batch, s sequence.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from common.model.attention import block_causal_mask, joined_rows
from common.training.optimizer import Trainee
from common.training.plan import Plan

Batch = dict[str, torch.Tensor]


WEIGHT_UNITS = 256  # of a weight of 1, where weights are not whole: Megatron-Core counts in int32


def sum_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor, units: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the supervised tokens' losses, their number as int32, [sum, number] for the log) of one micro-batch.

    Megatron-Core divides the summed gradients by the number over the global batch (calculate_per_token_loss), so the
    loss is the mean over its supervised tokens whatever TP, PP, DP and the micro-batch are. The first two are `units`
    times what they say; with weights the number is their sum, to 1 / `units`.
    losses, multiplied by loss_mask already, and loss_mask are [b, s] float32.
    """
    total = losses.sum()
    number = loss_mask.sum()
    # A copy: the schedule scales the first value in place.
    report = torch.stack([total.detach(), number]).clone()
    return total * units, (number * units).round().to(torch.int32), report


def forward_step(plan: Plan) -> Callable[[Iterator[Batch], Any], tuple[torch.Tensor, Callable[..., Any]]]:
    """The function that Megatron-Core's schedule calls for each micro-batch."""
    device = torch.device(plan.platform.device)
    units = WEIGHT_UNITS if plan.train and plan.train.weighted else 1

    def run(data: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch, apart = prepared(plan, next(data), device)
        positions = torch.arange(batch["tokens"].shape[1], device=device).expand_as(batch["tokens"])
        mask = apart.pop("attention_mask", None)
        output = model(batch["tokens"], positions, mask, labels=batch["labels"], loss_mask=batch["loss_mask"], **apart)
        return output, lambda losses: sum_loss(batch["loss_mask"], losses, units)

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
    return {name: tensor.to(device, non_blocking=True) for name, tensor in rows.items()}, apart


def context_parallel_part(rows: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """[b, s / size] of rows [b, s]: of 2 * size equal pieces of s the one at `rank` and the one as far from the end.

    So each rank has as much of causal attention to do as the others; Transformer Engine's attention expects this order
    (get_batch_on_this_cp_rank in Megatron-Core's utils.py).
    """
    pieces = rows.unflatten(1, (2 * size, -1))
    return torch.cat([pieces[:, rank], pieces[:, 2 * size - 1 - rank]], dim=1)


def run_microbatches(plan: Plan, trainee: Trainee, data: list[Iterator[Batch]], forward_only: bool) -> torch.Tensor:
    """[sum of losses, number of tokens] float64 over this rank's micro-batches; zeros but on the last stage."""
    rows, seq_length = plan.settings.micro_batch_size, plan.settings.seq_length
    if plan.joins_rows:
        rows, seq_length = 1, rows * seq_length
    reports = get_forward_backward_func()(
        forward_step_func=forward_step(plan),
        data_iterator=data if len(data) > 1 else data[0],
        model=trainee.model,
        num_microbatches=plan.num_microbatches,
        seq_length=seq_length,
        micro_batch_size=rows,
        decoder_seq_length=seq_length,
        forward_only=forward_only,
    )
    total = torch.zeros(2, dtype=torch.float64, device=torch.device(plan.platform.device))
    return total + torch.stack(reports).double().sum(0) if reports else total


def train_step(plan: Plan, trainee: Trainee, data: list[Iterator[Batch]]) -> tuple[torch.Tensor, float]:
    """(this rank's [sum of losses, tokens], gradient norm before clipping) after one step of the optimizer."""
    for chunk in trainee.model:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    report = run_microbatches(plan, trainee, data, forward_only=False)
    _, grad_norm, _ = trainee.optimizer.step()
    trainee.scheduler.step(increment=plan.settings.global_batch_size)
    return report, float(grad_norm or 0.0)


def mean_loss(report: torch.Tensor) -> float:
    """The mean loss over all ranks' tokens; `report` is this rank's [sum, tokens]. A collective call."""
    report = report.clone()
    dist.all_reduce(report, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(report, group=parallel_state.get_pipeline_model_parallel_group())
    total, number = report.tolist()
    return total / number if number else float("nan")


@torch.no_grad()
def evaluate(plan: Plan, trainee: Trainee, data: list[Iterator[Batch]], iterations: int) -> float:
    """The mean loss over `iterations` global batches of `data`, weighted by tokens."""
    overlap = trainee.model[0].ddp_config.overlap_param_gather
    for chunk in trainee.model:
        if overlap:  # else the forward pass would use parameters from before the last step
            chunk.disable_forward_pre_hook()
        chunk.eval()
    total = sum(run_microbatches(plan, trainee, data, forward_only=True) for _ in range(iterations))
    for chunk in trainee.model:
        chunk.train()
        if overlap:
            chunk.enable_forward_pre_hook()
    assert isinstance(total, torch.Tensor)
    return mean_loss(total)
