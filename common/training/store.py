"""Checkpoints of a run on disk, in both formats: torch_dist (Megatron-Core's) and torch (a file a rank).

Nothing half-written bears its final name: a checkpoint is written to `iter_….partial`, renamed when every rank is
done, and named in `latest_checkpointed_iteration.txt` last.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from common.checkpoint.arguments import megatron_arguments
from common.checkpoint.layout import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    copy_model_files,
    iteration_dir,
    list_iterations,
    rank_dir_name,
    write_tracker,
)
from common.checkpoint.mapping import rename_parameters
from common.checkpoint.pipeline import Layout
from common.checkpoint.torch_format import load_rank_file
from common.log import logger
from common.mcore import save_options
from common.model.build import unwrap
from common.training.distributed import random_state
from common.training.optimizer import Trainee
from common.training.plan import Plan
from common.training.state import (
    Progress,
    chunk_names,
    describe_run,
    finish_loading,
    initialise_optimizer,
    load_chunks,
    model_shards,
    same_layout,
    sharded_state,
)


class Store:
    """The checkpoint folder that a run writes to."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.folder = Path(plan.settings.save_checkpoint_path)
        self.asynchronous = AsyncCallsQueue() if plan.settings.async_save else None

    def save(self, trainee: Trainee, progress: Progress) -> None:
        """Writes a checkpoint of `progress`; with ASYNC_SAVE it is finished by a later `finish`. A collective call."""
        self.finish(wait=True)
        final = iteration_dir(self.folder, progress.iteration)
        partial = self._begin(final)
        if self.plan.ckpt_format == "torch":
            save_torch(self.plan, trainee, progress, partial)
        elif self._save_torch_dist(trainee, progress, partial, final):
            return
        self._publish(partial, final, progress.iteration)

    def _begin(self, final: Path) -> Path:
        """The empty folder to write to, beside `final`."""
        partial = final.with_name(final.name + ".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            copy_model_files(self.plan.start.model_folder, self.folder)
        dist.barrier()
        return partial

    def _save_torch_dist(self, trainee: Trainee, progress: Progress, partial: Path, final: Path) -> bool:
        """Whether the rest happens later, in `finish`."""
        state = sharded_state(trainee, loading=False)
        state |= {"iteration": progress.iteration, "checkpoint_version": 3.0, "run": describe_run(self.plan, progress)}
        asynchronous = self.asynchronous is not None
        request = dist_checkpointing.save(state, str(partial), async_sharded_save=asynchronous, **save_options())
        if request is None or self.asynchronous is None:
            return False
        request.finalize_fns.append(lambda: self._publish(partial, final, progress.iteration))
        self.asynchronous.schedule_async_request(request)
        return True

    def write_converted(self, trainee: Trainee, progress: Progress) -> None:
        """Writes in torch format what was loaded: under its iteration's name, or `release` for weights alone."""
        weights_only = self.plan.start.kind == "weights"
        final = self.folder / "release" if weights_only else iteration_dir(self.folder, progress.iteration)
        partial = self._begin(final)
        save_torch(self.plan, trainee, progress, partial, weights_only)
        self._publish(partial, final, "release" if weights_only else progress.iteration)

    def finish(self, wait: bool) -> None:
        """Publishes an asynchronous checkpoint that is written; with `wait`, waits for it. A collective call."""
        if self.asynchronous is not None:
            self.asynchronous.maybe_finalize_async_calls(blocking=wait)

    def _publish(self, partial: Path, final: Path, iteration: int | str) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            write_tracker(self.folder, iteration)
            logger.info("saved %s", final)
            self._prune()
        dist.barrier()

    def _prune(self) -> None:
        keep = self.plan.settings.keep_checkpoints
        old = list_iterations(self.folder)[:-keep] if keep else []
        for iteration in old:
            shutil.rmtree(iteration_dir(self.folder, iteration))
        if old:
            logger.info("removed %d older checkpoint(s): KEEP_CHECKPOINTS=%d", len(old), keep)


def rank_folder(checkpoint: Path) -> Path:
    """This tensor and pipeline rank's folder inside a checkpoint of torch format."""
    return checkpoint / rank_dir_name(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def save_torch(plan: Plan, trainee: Trainee, progress: Progress, folder: Path, weights_only: bool = False) -> None:
    """Writes `mp_rank_*/model_optim_rng.pt` and `distrib_optim.pt` under `folder`, one rank of each replica."""
    target = rank_folder(folder)
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    if first:
        target.mkdir(parents=True, exist_ok=True)
    sizes = plan.sizes
    layout = Layout(sizes.tp, sizes.pp, sizes.vpp, plan.transformer_impl, sizes.pipeline_layers)
    state: dict[str, Any] = {
        "args": megatron_arguments(plan.qwen, layout),
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        "run": describe_run(plan, progress),
    }
    for name, chunk in zip(chunk_names(len(trainee.model)), trainee.model, strict=True):
        weights = unwrap(chunk).state_dict()
        state[name] = {key: value for key, value in weights.items() if not key.endswith("_extra_state")}
    if not weights_only:
        state |= {
            "optimizer": trainee.optimizer.state_dict(),
            "opt_param_scheduler": trainee.scheduler.state_dict(),
            "rng_state": [random_state()],
        }
        trainee.optimizer.save_parameter_state(str(target / OPTIMIZER_FILE))  # gathers: every replica takes part
    if first:
        torch.save(state, target / MODEL_FILE)


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
        wanted = sharded_state(trainee, loading=True, sharding=sharding, with_rng=same_layout(plan, run))
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
    return Progress(**run["progress"])


def _load_rank(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    state = load_rank_file(rank_folder(checkpoint.path) / MODEL_FILE)
    for name in chunk_names(plan.sizes.vpp):
        state[name] = rename_parameters(state[name], plan.transformer_impl)
    return state
