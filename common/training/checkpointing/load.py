"""Loading of a checkpoint of either format into the training state: only its weights, or everything, to resume."""

import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, OPTIMIZER_FILE, Checkpoint
from common.checkpoint.formats.mapping import rename_parameters
from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.checkpoint.formats.torch_format import load_rank_file
from common.checkpoint.io.chunks import Chunk
from common.engine.dist_checkpointing import OPTIMIZER_SHARDING
from common.errors import KitError
from common.log import logger
from common.training.checkpointing.adapters import load_peft_adapter
from common.training.checkpointing.optimizer_state import initialize_optimizer_state, load_param_groups
from common.training.checkpointing.save_torch import rank_dir
from common.training.checkpointing.shards import StateShard, optimizer_shards, weight_shards
from common.training.checkpointing.state_dict import (
    Names,
    base_names,
    has_same_layout,
    legacy_state_dict,
    load_model_state_dict,
    model_keys,
    restore_scheduler_and_rng,
    saved_names,
    sharded_model_state_dict,
    sharded_objects,
)
from common.training.planning.plan import Plan, Progress
from common.training.state.fp8_state import has_fp8_state
from common.training.state.scheduler import override_checkpoint_settings
from common.training.state.training_state import TrainingState

NUM_READERS = 4  # threads per rank: one alone reads and copies more slowly than fast disks deliver


def load_checkpoint(plan: Plan, training_state: TrainingState) -> Progress:
    """Loads the checkpoint that `plan` starts from, if any; returns the run's progress."""
    checkpoint = plan.start.checkpoint
    if checkpoint is None:
        return Progress()
    if plan.adapters:
        load_weights(plan, training_state, plan.adapters.base, base_names)
        if plan.adapters.peft:
            load_peft_adapter(plan.adapters.peft, plan.adapters.lora, plan.qwen, training_state)
    if plan.start.kind == "resume":
        return resume(plan, training_state, checkpoint)
    if plan.adapters:
        return Progress()
    load_weights(plan, training_state, checkpoint)
    return Progress()


def load_weights(
    plan: Plan, training_state: TrainingState, checkpoint: Checkpoint, names: Names = lambda name: True
) -> None:
    """Loads the parameters `names` of `checkpoint` into the model and the master weights."""
    if checkpoint.format == "torch_dist":
        sharded_state_dict = sharded_model_state_dict(training_state.model, names)
        load_shards(TorchDistReader(checkpoint.path), weight_shards(training_state, sharded_state_dict, own=False))
    else:
        load_model_state_dict(training_state.model, _load_rank_file(plan, checkpoint), names)
    training_state.optimizer.reload_model_params()  # the float32 master weights are copies


@torch.no_grad()
def resume(plan: Plan, training_state: TrainingState, checkpoint: Checkpoint) -> Progress:
    """Restores model, optimizer, schedule and random state from `checkpoint`; returns the progress of its run.

    The float32 master weights come from the optimizer's state: copied from the bf16 model, they would lose their lower
    bits.
    """
    if checkpoint.format == "torch_dist":
        state_dict = _resume_torch_dist(plan, training_state, checkpoint)
    else:
        state_dict = _load_rank_file(plan, checkpoint)
        initialize_optimizer_state(training_state)
        load_model_state_dict(training_state.model, state_dict, saved_names(plan))
        load_param_groups(training_state, state_dict["optimizer"]["optimizer"]["param_groups"])
        training_state.optimizer.load_parameter_state(str(rank_dir(checkpoint.path) / OPTIMIZER_FILE))
    saved_rate = training_state.optimizer.param_groups[0]["lr"]
    restore_scheduler_and_rng(plan, training_state, state_dict)
    if plan.settings.train_or_convert_ckpt == "train":
        changes = override_checkpoint_settings(training_state.optimizer, training_state.scheduler, plan.settings)
        if changes:
            logger.info("resumed with changed settings: %s", ", ".join(changes))
        rate = training_state.optimizer.param_groups[0]["lr"]
        if not math.isclose(saved_rate, rate, rel_tol=1e-6):
            logger.info(
                "the next step's learning rate was %.3g by the checkpoint's schedule, and is %.3g", saved_rate, rate
            )
    return Progress(**state_dict["run"]["progress"])


def _resume_torch_dist(plan: Plan, training_state: TrainingState, checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's state other than tensors; loads this rank's shard of the optimizer, and its chunks' weights."""
    common = dist_checkpointing.load_common_state_dict(str(checkpoint.path))
    run = common["run"]
    same_layout = has_same_layout(plan, run)
    with_fp8 = same_layout and bool(run.get("fp8_state")) and has_fp8_state(plan.settings)
    if run["optimizer_sharding"] != OPTIMIZER_SHARDING:
        targets = legacy_state_dict(training_state, run["optimizer_sharding"], with_rng=same_layout, with_fp8=with_fp8)
        state_dict: dict[str, Any] = dist_checkpointing.load(targets, str(checkpoint.path))
        load_model_state_dict(training_state.model, state_dict)
        training_state.optimizer.load_state_dict(state_dict["optimizer"])
        return state_dict
    initialize_optimizer_state(training_state)
    load_param_groups(training_state, common["optimizer"]["optimizer"]["param_groups"])
    reader = TorchDistReader(checkpoint.path)
    sharded_state_dict = sharded_model_state_dict(training_state.model, saved_names(plan))
    weights = weight_shards(training_state, sharded_state_dict, own=False)
    load_shards(reader, weights, optimizer_shards(training_state, sharded_state_dict))
    objects = sharded_objects(plan, training_state) if same_layout else []
    return {
        **common,
        **{each.key: reader.object(each.unique_key) for each in objects if with_fp8 or each.key != "fp8_state"},
    }


def load_shards(reader: TorchDistReader, *groups: Iterable[StateShard]) -> None:
    """Fills the tensors of `groups` of shards; raises KitError if the checkpoint does not fit them, or is damaged.

    A group is complete before the next one begins: master weights may be set by what their weights lack of them. Rows
    of a padded vocabulary that the checkpoint lacks are not changed.
    """
    began = time.monotonic()
    num_bytes = 0
    with ThreadPoolExecutor(NUM_READERS) as readers:
        for shards in groups:
            tasks = [readers.submit(_load_shard, shard, reader) for shard in shards]
            try:
                num_bytes += sum(task.result() for task in tasks)
            except BaseException:
                readers.shutdown(cancel_futures=True)
                raise
    if dist.get_rank() == 0:
        seconds = time.monotonic() - began
        logger.info("read %.1f MB of %s in %.1f s on rank 0", num_bytes / 1e6, reader.path, seconds)


@torch.no_grad()
def _load_shard(shard: StateShard, reader: TorchDistReader) -> int:
    """The number of bytes that were read."""
    stored = reader.tensors.get(shard.key)
    shape = stored.shape if stored else None
    if shape != shard.global_shape and not (
        shard.allow_shape_mismatch and shape and shape[1:] == shard.global_shape[1:]
    ):
        raise KitError(
            f"{reader.path} has {shard.key} of shape {list(shape) if shape else 'none'}, and this model needs"
            f" {list(shard.global_shape)}: check config.json, TP, PP, VPP and TRANSFORMER_IMPL"
        )
    place, num_bytes = shard.place.overlap(Chunk((0,) * len(shape), shape)) if shape else shard.place, 0
    if place is not None:
        inner = shard.tensor[place.slices_in(shard.place)]
        for at, values, checksum in reader.blocks(shard.key, place):
            if checksum:
                checksum.update(values)
            inner[at].copy_(values)
            num_bytes += values.nbytes
    return num_bytes


def _load_rank_file(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    state_dict = load_rank_file(rank_dir(checkpoint.path) / MODEL_FILE)
    for key in model_keys(plan.sizes.vpp):
        state_dict[key] = rename_parameters(state_dict[key], plan.transformer_impl)
    return state_dict
