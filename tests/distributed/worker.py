"""Runs in each rank: the model's own outputs, for tests that compare them with Hugging Face's.

    python -m tests.distributed.worker '{"settings": {...}, "runs": [{"load": DIR, "out": FILE, "gradients": false}]}'

Each run loads the checkpoint `load` and writes, on rank 0, the logits [b, s, v] of the saved tokens, or with
`gradients` the loss and each parameter's gradient (one process only).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import log
from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.engine.installation import prepare
from common.model.shape.config import load_config
from common.parallel import ParallelSizes
from common.platforms.cpu import CPU
from common.training.planning.plan import Plan, Start
from common.training.settings import TrainSettings


def plan_of(settings: dict[str, Any], folder: Path) -> Plan:
    train_settings = TrainSettings(save_checkpoint_path="/nowhere", dataset_path="/nowhere", train_iters=1, **settings)
    checkpoint = find_checkpoint(folder)
    assert checkpoint
    return Plan(
        settings=train_settings, platform=CPU, sizes=train_settings.sizes, qwen=load_config(folder),
        start=Start("weights", folder, checkpoint), transformer_impl="local", ckpt_format="torch_dist",
        train=None, valid=None, train_iters=1,
    )  # fmt: skip


def logits_of(plan: Plan, tokens: torch.Tensor) -> torch.Tensor | None:
    """The logits [b, s, v] on rank 0, through Megatron-Core's own schedule."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from common.training.checkpointing.load import load_weights
    from common.training.state.training_state import build_training_state

    training_state = build_training_state(plan)
    assert plan.start.checkpoint
    load_weights(plan, training_state, plan.start.checkpoint)
    position_ids = torch.arange(tokens.shape[1]).expand(tokens.shape)

    def forward_step(data: Any, model: Any) -> Any:
        return model(tokens, position_ids, None), lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter([]) for _ in training_state.model],
            model=training_state.model,
            num_microbatches=plan.sizes.pp if plan.sizes.vpp > 1 else 1,  # interleaving needs as many
            seq_length=tokens.shape[1], micro_batch_size=tokens.shape[0], forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
    box: list[Any] = [None]
    if outputs:
        box[0] = gather_from_tensor_model_parallel_region(outputs[0])[..., : plan.qwen.vocab_size].clone()
    source = dist.get_world_size() - 1
    assert parallel_state.is_pipeline_last_stage() == bool(outputs)
    dist.broadcast_object_list(box, source)
    return box[0] if dist.get_rank() == 0 else None


def gradients_of(plan: Plan, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The loss of `batch` and each parameter's gradient, as the optimizer is about to see them."""
    from common.model.build import unwrap
    from common.training.checkpointing.load import load_weights
    from common.training.loop.forward_step import forward_backward, mean_loss, sum_reporting_losses
    from common.training.state.training_state import build_training_state

    training_state = build_training_state(plan)
    assert plan.start.checkpoint
    load_weights(plan, training_state, plan.start.checkpoint)
    size = plan.settings.micro_batch_size
    parts = [{name: x[i : i + size] for name, x in batch.items()} for i in range(0, len(batch["tokens"]), size)]
    report = sum_reporting_losses(plan, forward_backward(plan, training_state, [iter(parts)], forward_only=False))
    gradients = {name: p.main_grad.clone() for name, p in unwrap(training_state.model[0]).named_parameters()}
    return {"loss": mean_loss(report)[0], "gradients": gradients}


def main() -> None:
    """Does each run."""
    log.quiet_libraries()
    prepare(CPU)
    from common.training.launching.process_group import process_group

    task = json.loads(sys.argv[1])
    batch = torch.load(task["batch"])
    first = plan_of(task["settings"], Path(task["runs"][0]["load"]))
    sizes: ParallelSizes = first.sizes
    with process_group(CPU, sizes, 1234, 5):
        for run in task["runs"]:
            plan = plan_of(task["settings"], Path(run["load"]))
            result = gradients_of(plan, batch) if run.get("gradients") else logits_of(plan, batch["tokens"])
            if dist.get_rank() == 0:
                torch.save(result, run["out"])


if __name__ == "__main__":
    main()
