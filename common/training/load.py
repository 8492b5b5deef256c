"""A checkpoint of either format into a built model: its weights alone, or all that a run goes on from."""

from typing import Any

import torch
from megatron.core import dist_checkpointing

from common.checkpoint.layout import MODEL_FILE, OPTIMIZER_FILE, Checkpoint
from common.checkpoint.mapping import rename_parameters
from common.checkpoint.torch_format import load_rank_file
from common.log import logger
from common.training.fp8_state import has_fp8_state
from common.training.optimizer import Trainee, apply_settings
from common.training.plan import Plan
from common.training.state import (
    Progress,
    chunk_names,
    finish_loading,
    initialise_optimizer,
    load_chunks,
    model_shards,
    same_layout,
    sharded_state,
)
from common.training.torch_save import rank_folder


def load_weights(plan: Plan, trainee: Trainee, checkpoint: Checkpoint) -> None:
    """The weights of `checkpoint` alone, into model and master weights."""
    if checkpoint.format == "torch_dist":
        state = dist_checkpointing.load(model_shards(trainee), str(checkpoint.path))
    else:
        state = _load_rank(plan, checkpoint)
    load_chunks(trainee, state)
    trainee.optimizer.reload_model_params()  # the float32 master weights are copies


@torch.no_grad()
def resume(plan: Plan, trainee: Trainee, checkpoint: Checkpoint) -> Progress:
    """Where the run that wrote `checkpoint` was; model, optimizer, schedule and random state are put back.

    The float32 master weights come from the optimizer's state alone. Megatron-Core reads `fully_sharded_model_space`
    straight into them: copied from the bf16 model after that, they would lose their lower bits.
    """
    if checkpoint.format == "torch_dist":
        run = dist_checkpointing.load_common_state_dict(str(checkpoint.path))["run"]
        sharding = run["optimizer_sharding"]
        same = same_layout(plan, run)
        fp8 = same and bool(run.get("fp8_state")) and has_fp8_state(plan.settings)
        wanted = sharded_state(trainee, loading=True, sharding=sharding, with_rng=same, with_fp8=fp8)
        state = dist_checkpointing.load(wanted, str(checkpoint.path))
    else:
        state = _load_rank(plan, checkpoint)
        run = state["run"]
        initialise_optimizer(trainee)
    load_chunks(trainee, state)
    trainee.optimizer.load_state_dict(state["optimizer"])
    if checkpoint.format == "torch":
        trainee.optimizer.load_parameter_state(str(rank_folder(checkpoint.path) / OPTIMIZER_FILE))
    finish_loading(trainee, state, plan)
    if plan.settings.train_or_convert_ckpt == "train":
        changed = apply_settings(trainee, plan.settings)
        if changed:
            logger.info("resumed with other settings than before: %s", ", ".join(changed))
    return Progress(**run["progress"])


def _load_rank(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    state = load_rank_file(rank_folder(checkpoint.path) / MODEL_FILE)
    for name in chunk_names(plan.sizes.vpp):
        state[name] = rename_parameters(state[name], plan.transformer_impl)
    return state
