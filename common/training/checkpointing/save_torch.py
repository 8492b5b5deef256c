"""Saving in torch format: one file per tensor and pipeline rank, with the optimizer's state beside it."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, OPTIMIZER_FILE, rank_dir_name
from common.checkpoint.formats.megatron_args import megatron_arguments
from common.checkpoint.formats.parallel_layout import ParallelLayout
from common.files import sync
from common.model.build import unwrap
from common.training.checkpointing.optimizer_state import ensure_optimizer_state, param_groups_to_save
from common.training.checkpointing.state_dict import describe_run, model_keys, saved_names
from common.training.launching.process_group import random_state
from common.training.planning.plan import Plan, Progress
from common.training.state.fp8_state import fp8_state, has_fp8_state
from common.training.state.scheduler import schedule_state
from common.training.state.training_state import TrainingState


def rank_dir(checkpoint: Path) -> Path:
    """This tensor and pipeline rank's folder in a checkpoint of torch format."""
    return checkpoint / rank_dir_name(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def make_rank_dirs(plan: Plan, folder: Path) -> None:
    """Makes the folders of all ranks in `folder`; called on one rank."""
    for pp_rank in range(plan.sizes.pp):
        for tp_rank in range(plan.sizes.tp):
            (folder / rank_dir_name(tp_rank, pp_rank, plan.sizes.pp)).mkdir(exist_ok=True)


def save_torch(
    plan: Plan, training_state: TrainingState, progress: Progress, folder: Path, *, weights_only: bool
) -> None:
    """Writes `mp_rank_*/model_optim_rng.pt` and `distrib_optim.pt` to `folder`, on one rank of each replica.

    A collective call, whose collectives are complete before anything is written.
    """
    target = rank_dir(folder)
    is_main_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    sizes = plan.sizes
    layout = ParallelLayout(sizes.tp, sizes.pp, sizes.vpp, plan.transformer_impl, sizes.pipeline_layers)
    state: dict[str, Any] = {
        "args": megatron_arguments(plan.qwen, layout),
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        "run": describe_run(plan, progress),
    }
    names = saved_names(plan)
    for key, chunk in zip(model_keys(len(training_state.model)), training_state.model, strict=True):
        weights = unwrap(chunk).state_dict()
        kept = (name for name in weights if not name.endswith("_extra_state") and names(name))
        state[key] = {name: weights[name] for name in kept}
    if not weights_only:
        ensure_optimizer_state(training_state)
        state |= {
            "optimizer": {"optimizer": {"param_groups": param_groups_to_save(training_state)}},
            "opt_param_scheduler": schedule_state(training_state.scheduler),
            "rng_state": [random_state()],
        }
        if has_fp8_state(plan.settings):
            state["fp8_state"] = fp8_state(training_state.model)
        training_state.optimizer.save_parameter_state(str(target / OPTIMIZER_FILE))  # gathers on every replica
    if is_main_replica:
        with (target / MODEL_FILE).open("wb") as stream:
            torch.save(state, stream)
        for path in target.iterdir():
            sync(path)
        sync(target)
