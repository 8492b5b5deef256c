"""One optimizer step, and one evaluation: micro-batches through Megatron-Core's schedule, the loss over its tokens.

Letters: b micro-batch, s sequence.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from common.model.attention import block_causal_mask
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
    seq_length = plan.settings.seq_length
    position_ids = torch.arange(seq_length, device=device).expand(plan.settings.micro_batch_size, -1)

    def run(data: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(data).items()}
        segments = batch.get("segment_ids")
        mask = None if segments is None else block_causal_mask(segments)
        output = model(batch["tokens"], position_ids, mask, labels=batch["labels"], loss_mask=batch["loss_mask"])
        return output, lambda losses: sum_loss(batch["loss_mask"], losses, units)

    return run


def run_microbatches(plan: Plan, trainee: Trainee, data: list[Iterator[Batch]], forward_only: bool) -> torch.Tensor:
    """[sum of losses, number of tokens] float64 over this rank's micro-batches; zeros but on the last stage."""
    reports = get_forward_backward_func()(
        forward_step_func=forward_step(plan),
        data_iterator=data if len(data) > 1 else data[0],
        model=trainee.model,
        num_microbatches=plan.num_microbatches,
        seq_length=plan.settings.seq_length,
        micro_batch_size=plan.settings.micro_batch_size,
        decoder_seq_length=plan.settings.seq_length,
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
