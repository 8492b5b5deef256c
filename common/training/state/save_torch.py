"""A checkpoint in torch format: a file a tensor and pipeline rank, the optimizer's beside it."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from common.atomic_file import sync
from common.checkpoint.formats.arguments import megatron_arguments
from common.checkpoint.formats.layout import MODEL_FILE, OPTIMIZER_FILE, rank_dir_name
from common.checkpoint.formats.pipeline import Layout
from common.model.build import unwrap
from common.training.launching.process_group import random_state
from common.training.planning.plan import Plan, Progress
from common.training.state.contents import chunk_names, describe_run, need_optimizer_state, saved_groups
from common.training.state.fp8_state import fp8_state, has_fp8_state
from common.training.state.training_state import TrainingState


def rank_folder(checkpoint: Path) -> Path:
    """This tensor and pipeline rank's folder inside a checkpoint of torch format."""
    return checkpoint / rank_dir_name(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def make_rank_folders(plan: Plan, folder: Path) -> None:
    """The folders of all ranks under `folder`, made by one."""
    for pp_rank in range(plan.sizes.pp):
        for tp_rank in range(plan.sizes.tp):
            (folder / rank_dir_name(tp_rank, pp_rank, plan.sizes.pp)).mkdir(exist_ok=True)


def save_torch(
    plan: Plan, training_state: TrainingState, progress: Progress, folder: Path, weights_only: bool = False
) -> None:
    """Writes `mp_rank_*/model_optim_rng.pt` and `distrib_optim.pt` under `folder`, one rank of each replica.

    A collective call whose collectives are over before anything is written.
    """
    target = rank_folder(folder)
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    sizes = plan.sizes
    layout = Layout(sizes.tp, sizes.pp, sizes.vpp, plan.transformer_impl, sizes.pipeline_layers)
    state: dict[str, Any] = {
        "args": megatron_arguments(plan.qwen, layout),
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        "run": describe_run(plan, progress),
    }
    for name, chunk in zip(chunk_names(len(training_state.model)), training_state.model, strict=True):
        weights = unwrap(chunk).state_dict()
        state[name] = {key: value for key, value in weights.items() if not key.endswith("_extra_state")}
    if not weights_only:
        need_optimizer_state(training_state)
        state |= {
            "optimizer": {"optimizer": {"param_groups": saved_groups(training_state)}},
            "opt_param_scheduler": training_state.scheduler.state_dict(),
            "rng_state": [random_state()],
        }
        if has_fp8_state(plan.settings):
            state["fp8_state"] = fp8_state(training_state.model)
        training_state.optimizer.save_parameter_state(str(target / OPTIMIZER_FILE))  # gathers: every replica takes part
    if first:
        with (target / MODEL_FILE).open("wb") as stream:
            torch.save(state, stream)
        for path in target.iterdir():
            sync(path)
        sync(target)
