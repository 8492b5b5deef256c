"""Runs in each rank: packed rows against each of their samples in a row of its own, in the same layout.

    python -m tests.distributed.packing_worker '{"settings": {...}, "load": DIR, "batch": FILE, "out": FILE}'

FILE of `batch` holds tokens, labels, loss_mask and segment_ids [rows, s]. Rank 0 writes to `out` the losses of both
and, over all ranks, the largest difference of logits and of gradients relative to the largest; "without" is the
same for packed rows that are not separated, and "joined" for rows joined to one, as Transformer Engine has them.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import log
from common.engine.installation import prepare
from common.platforms.cpu import CPU
from common.training.planning.plan import Plan
from tests.distributed.worker import plan_of

Batch = dict[str, torch.Tensor]


def alone(packed: Batch) -> Batch:
    """Each segment of `packed` in a row of its own, padded with zeros; in order."""
    rows: list[Batch] = []
    for row in range(packed["tokens"].shape[0]):
        segments = packed["segment_ids"][row]
        for number in segments.unique().tolist():
            there = segments == number
            size = int(there.sum())
            values = {name: torch.zeros_like(x[row]) for name, x in packed.items() if name != "segment_ids"}
            for name, value in values.items():
                value[:size] = packed[name][row][there]
            rows.append(values)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def regroup(logits: torch.Tensor, packed: Batch) -> torch.Tensor:
    """The logits of `alone`'s rows back at their places in `packed`'s: [rows, s, v]."""
    places = torch.zeros(*packed["tokens"].shape, logits.shape[-1])
    at = 0
    for row in range(places.shape[0]):
        segments = packed["segment_ids"][row]
        for number in segments.unique().tolist():
            there = segments == number
            places[row][there] = logits[at, : int(there.sum())]
            at += 1
    return places


def of_size(plan: Plan, rows: int, micro_batch_size: int = 1) -> Plan:
    return replace(plan, settings=replace(plan.settings, global_batch_size=rows, micro_batch_size=micro_batch_size))


def gradients(plan: Plan, batch: Batch, micro_batch_size: int = 1) -> tuple[float, list[torch.Tensor]]:
    """The mean loss of `batch` and this rank's gradients."""
    from common.training.checkpointing.load import load_weights
    from common.training.loop.forward_step import forward_backward, mean_loss, sum_reporting_losses
    from common.training.state.training_state import build_training_state

    plan = of_size(plan, len(batch["tokens"]), micro_batch_size)
    training_state = build_training_state(plan)
    assert plan.start.checkpoint
    load_weights(plan, training_state, plan.start.checkpoint)
    starts = range(0, len(batch["tokens"]), micro_batch_size)
    parts = [{name: x[i : i + micro_batch_size] for name, x in batch.items()} for i in starts]
    report = sum_reporting_losses(plan, forward_backward(plan, training_state, [iter(parts)], forward_only=False))
    found = [p.main_grad.clone() for chunk in training_state.model for p in chunk.parameters()]
    return mean_loss(report)[0], found


def logits(plan: Plan, batch: Batch) -> torch.Tensor | None:
    """This rank's part of the logits [rows, s, v / tp]; None but on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from common.model.layers.documents import separation
    from common.training.checkpointing.load import load_weights
    from common.training.state.training_state import build_training_state

    training_state = build_training_state(plan)
    assert plan.start.checkpoint
    load_weights(plan, training_state, plan.start.checkpoint)
    size = batch["tokens"].shape[1]
    parts = iter([{name: x[i : i + 1] for name, x in batch.items()} for i in range(len(batch["tokens"]))])

    def forward_step(_: Any, model: Any) -> Any:
        part = next(parts)
        mask = separation(part["segment_ids"], torch.device("cpu")) if "segment_ids" in part else None
        output = model(part["tokens"], torch.arange(size)[None], mask)
        return output, lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter([]), model=training_state.model,
            num_microbatches=len(batch["tokens"]), seq_length=size, micro_batch_size=1, forward_only=True,
            collect_non_loss_data=True,
        )  # fmt: skip
    return torch.cat(outputs).float() if outputs else None


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    box = torch.tensor([value])
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return float(box)


def compare(plan: Plan, packed: Batch, separate: Batch, reference: Batch) -> dict[str, Any]:
    """How `packed` differs from `separate`; `reference` has the segments."""
    loss, grads = gradients(plan, packed)
    loss_alone, grads_alone = gradients(plan, separate)
    mine, theirs = logits(plan, packed), logits(plan, separate)
    used = reference["loss_mask"].sum(1).bool()
    apart_logits = 0.0
    if mine is not None and theirs is not None:
        apart_logits = difference(mine[used], regroup(theirs, reference)[used])
    return {
        "loss": loss,
        "loss_alone": loss_alone,
        "gradients": largest(max(map(difference, grads, grads_alone))),
        "logits": largest(apart_logits),
        "num_gradients": len(grads),
    }


class SegmentAttention(torch.nn.Module):
    """What Transformer Engine's attention does with rows joined to one: each segment of [t, n, d] by itself."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **given: Any) -> Any:
        bounds = given["packed_seq_params"]
        assert bounds.qkv_format == "thd" and bounds.cu_seqlens_q.dtype == torch.int32
        sizes = bounds.cu_seqlens_q.diff().tolist()
        assert max(sizes) <= bounds.max_seqlen_q and sum(sizes) == query.shape[0]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))  # torch 2.1
        parts = zip(*(x.transpose(0, 1).split(sizes, dim=1) for x in (query, key, value)), strict=True)
        outs = [F.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
        return torch.cat(outs, dim=1).transpose(0, 1)


def compare_joined(plan: Plan, packed: Batch, separate: Batch) -> dict[str, Any]:
    """How `packed`, all of it one micro-batch of joined rows, differs from `separate` in loss and gradients."""
    loss_alone, grads_alone = gradients(plan, separate)
    with (
        patch("common.model.kernels.selection.core_attention", lambda *_: SegmentAttention),
        patch.object(Plan, "packed_sequences", True),
    ):
        loss, grads = gradients(plan, packed, len(packed["tokens"]))
    worst = largest(max(map(difference, grads, grads_alone)))
    return {"loss": loss, "loss_alone": loss_alone, "gradients": worst}


def main() -> None:
    log.quiet_libraries()
    prepare(CPU)
    from common.training.launching.process_group import process_group

    task = json.loads(sys.argv[1])
    packed = torch.load(task["batch"])
    plan = plan_of(task["settings"], Path(task["load"]))
    with process_group(CPU, plan.sizes, 1234, 5):
        separate = alone(packed)
        kept = compare(plan, packed, separate, packed)
        open_rows = {name: x for name, x in packed.items() if name != "segment_ids"}
        result = {"kept": kept, "without": compare(plan, open_rows, separate, packed), "rows": len(separate["tokens"])}
        result["joined"] = compare_joined(plan, packed, separate)
        if dist.get_rank() == 0:
            Path(task["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
