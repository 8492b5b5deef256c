"""A checkpoint of either format into a built model: its weights alone, or all that a run goes on from."""

import itertools
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from common.checkpoint.formats.layout import MODEL_FILE, OPTIMIZER_FILE, Checkpoint
from common.checkpoint.formats.mapping import rename_parameters
from common.checkpoint.formats.torch_dist import DistReader
from common.checkpoint.formats.torch_format import load_rank_file
from common.checkpoint.io.rectangles import Rectangle
from common.engine.dist_checkpointing import OPTIMIZER_SHARDING
from common.errors import KitError
from common.log import logger
from common.training.planning.plan import Plan
from common.training.state.contents import (
    Progress,
    chunk_names,
    finish_loading,
    initialise_optimizer,
    load_chunks,
    load_groups,
    model_shards,
    old_state,
    rank_objects,
    same_layout,
)
from common.training.state.fp8_state import has_fp8_state
from common.training.state.save_torch import rank_folder
from common.training.state.shards import Part, optimizer_state_parts, weight_parts
from common.training.state.training_state import TrainingState, apply_settings

READERS = 4  # threads: one alone takes zlib's 1.3 GB/s of checksums, whatever the disk gives


def load_weights(plan: Plan, training_state: TrainingState, checkpoint: Checkpoint) -> None:
    """The weights of `checkpoint` alone, into model and master weights."""
    if checkpoint.format == "torch_dist":
        load_parts(weight_parts(training_state, model_shards(training_state), own=False), DistReader(checkpoint.path))
    else:
        load_chunks(training_state, _load_rank(plan, checkpoint))
    training_state.optimizer.reload_model_params()  # the float32 master weights are copies


@torch.no_grad()
def resume(plan: Plan, training_state: TrainingState, checkpoint: Checkpoint) -> Progress:
    """Where the run that wrote `checkpoint` was; model, optimizer, schedule and random state are put back.

    The float32 master weights come from the optimizer's state alone: copied from the bf16 model after that, they would
    lose their lower bits.
    """
    if checkpoint.format == "torch_dist":
        state = _resume_dist(plan, training_state, checkpoint)
    else:
        state = _load_rank(plan, checkpoint)
        initialise_optimizer(training_state)
        load_chunks(training_state, state)
        load_groups(training_state, state["optimizer"]["optimizer"]["param_groups"])
        training_state.optimizer.load_parameter_state(str(rank_folder(checkpoint.path) / OPTIMIZER_FILE))
    finish_loading(training_state, state, plan)
    if plan.settings.train_or_convert_ckpt == "train":
        changed = apply_settings(training_state, plan.settings)
        if changed:
            logger.info("resumed with other settings than before: %s", ", ".join(changed))
    return Progress(**state["run"]["progress"])


def _resume_dist(plan: Plan, training_state: TrainingState, checkpoint: Checkpoint) -> dict[str, Any]:
    """What beside tensors was in it; a rank reads its own share of the optimizer, and its chunks' weights."""
    common = dist_checkpointing.load_common_state_dict(str(checkpoint.path))
    run = common["run"]
    same = same_layout(plan, run)
    with_fp8 = same and bool(run.get("fp8_state")) and has_fp8_state(plan.settings)
    if run["optimizer_sharding"] != OPTIMIZER_SHARDING:
        wanted = old_state(training_state, run["optimizer_sharding"], with_rng=same, with_fp8=with_fp8)
        state: dict[str, Any] = dist_checkpointing.load(wanted, str(checkpoint.path))
        load_chunks(training_state, state)
        training_state.optimizer.load_state_dict(state["optimizer"])
        return state
    initialise_optimizer(training_state)
    load_groups(training_state, common["optimizer"]["optimizer"]["param_groups"])
    reader, shards = DistReader(checkpoint.path), model_shards(training_state)
    load_parts(
        itertools.chain(weight_parts(training_state, shards, own=False), optimizer_state_parts(training_state, shards)),
        reader,
    )
    objects = [each for each in rank_objects(training_state, plan) if same and (with_fp8 or each.key != "fp8_state")]
    return {**common, **{each.key: reader.object(each.unique_key) for each in objects}}


def load_parts(parts: Iterable[Part], reader: DistReader) -> None:
    """Fills the tensors of `parts`; raises KitError where the checkpoint has not what fits them, or is damaged.

    The rows of a padded vocabulary that the checkpoint has not stay as they are.
    """
    began = time.monotonic()
    with ThreadPoolExecutor(READERS) as readers:
        tasks = [readers.submit(_load_part, part, reader) for part in parts]
        try:
            num_bytes = sum(task.result() for task in tasks)
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise
    if dist.get_rank() == 0:
        seconds = time.monotonic() - began
        logger.info("read %.1f MB of %s in %.1f s on rank 0", num_bytes / 1e6, reader.path, seconds)


@torch.no_grad()
def _load_part(part: Part, reader: DistReader) -> int:
    """The number of bytes that were read."""
    stored = reader.tensors.get(part.key)
    found = stored.shape if stored else None
    if found != part.global_shape and not (part.padded and found and found[1:] == part.global_shape[1:]):
        raise KitError(
            f"{reader.path} has {part.key} of shape {list(found) if found else 'none'}, and this model needs"
            f" {list(part.global_shape)}: check config.json, TP, PP, VPP and TRANSFORMER_IMPL"
        )
    place, num_bytes = part.place.common(Rectangle((0,) * len(found), found)) if found else part.place, 0
    if place is not None:
        inner = part.tensor[place.within(part.place)]
        for at, values, checksum in reader.blocks(part.key, place):
            if checksum:
                checksum.take(values)
            inner[at].copy_(values)
            num_bytes += values.nbytes
    return num_bytes


def _load_rank(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    state = load_rank_file(rank_folder(checkpoint.path) / MODEL_FILE)
    for name in chunk_names(plan.sizes.vpp):
        state[name] = rename_parameters(state[name], plan.transformer_impl)
    return state
