"""The contents of a checkpoint: weights, optimizer, schedule, random state and the position in the data."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject

from common.engine.dist_checkpointing import (
    OPTIMIZER_SHARDING,
    content_metadata,
    save_options,
    sharded_optimizer_state,
)
from common.engine.versions import installed_engine
from common.errors import KitError
from common.log import logger
from common.model.build import unwrap
from common.model.shape.lora import is_adapter
from common.training.checkpointing.optimizer_state import (
    ensure_optimizer_state,
    initialize_optimizer_state,
    param_groups_to_save,
)
from common.training.checkpointing.shards import StateShard, optimizer_shards, weight_shards
from common.training.launching.process_group import random_state, restore_random_state
from common.training.planning.frozen import describe_frozen
from common.training.planning.plan import Plan, Progress
from common.training.state.fp8_state import fp8_state, has_fp8_state, restore_fp8_state
from common.training.state.scheduler import restore_schedule, schedule_state
from common.training.state.training_state import TrainingState

LAYOUT = ("tp", "pp", "vpp", "cp", "dp")


@dataclass(frozen=True)
class RankStateDict:
    """What a rank writes to a torch_dist checkpoint, and what is written once for all ranks."""

    shards: list[StateShard]
    objects: dict[str, Any]  # by Megatron-Core's keys of sharded objects
    common: dict[str, Any]


def generate_state_dict(plan: Plan, training_state: TrainingState, progress: Progress) -> RankStateDict:
    """This rank's part of a torch_dist checkpoint; no collective call."""
    if plan.settings.save_optimizer:
        ensure_optimizer_state(training_state)
    shards = shards_to_save(plan, training_state)
    common: dict[str, Any] = {"iteration": progress.iteration, "checkpoint_version": 3.0} | save_options()
    common["run"] = describe_run(plan, progress)
    objects = {}
    if plan.settings.save_optimizer:
        groups = {"param_groups": param_groups_to_save(training_state)}
        common["optimizer"] = {"optimizer": groups, "param_state_sharding_type": OPTIMIZER_SHARDING}
        common["opt_param_scheduler"] = schedule_state(training_state.scheduler)
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            objects = {each.unique_key: each.data for each in sharded_objects(plan, training_state)}
    return RankStateDict(shards, objects, common)


def shards_to_save(plan: Plan, training_state: TrainingState) -> list[StateShard]:
    """The shards of weights and optimizer that this rank writes; the optimizer must have its state."""
    sharded_state_dict = sharded_model_state_dict(training_state.model, saved_names(plan))
    shards = list(weight_shards(training_state, sharded_state_dict, own=True))
    if plan.settings.save_optimizer:
        shards += optimizer_shards(training_state, sharded_state_dict)
    return [shard for shard in shards if shard.is_main_replica]


Names = Callable[[str], bool]  # whether a parameter of that name is meant


def saved_names(plan: Plan) -> Names:
    """The parameters that the run's checkpoints hold: all, or with TUNER=lora the adapters."""
    return is_adapter if plan.adapters else lambda name: True


def base_names(name: str) -> bool:
    """The parameters that do not belong to adapters."""
    return not is_adapter(name)


def model_keys(num_chunks: int) -> list[str]:
    """The keys of a rank's chunks in a checkpoint, as in Megatron-LM: `model`, or `model0`, `model1`, ..."""
    return ["model"] if num_chunks == 1 else [f"model{index}" for index in range(num_chunks)]


def describe_run(plan: Plan, progress: Progress) -> dict[str, Any]:
    """What a checkpoint records of the run that wrote it; plain values, so that it loads with `weights_only`."""
    layout = {name: getattr(plan.sizes, name) for name in LAYOUT}
    data = plan.data_identity if plan.train else None
    return {
        "progress": asdict(progress),
        "layout": layout,
        "optimizer_sharding": OPTIMIZER_SHARDING,
        "data": data,
        "optimizer": plan.settings.save_optimizer,
        "fp8_state": has_fp8_state(plan.settings),
        "precision": plan.settings.precision,
        **({"frozen": describe_frozen(plan.frozen)} if plan.frozen else {}),
        **({"adapter": plan.adapters.saved.metadata()} if plan.adapters else {}),
    }


def has_same_layout(plan: Plan, run: dict[str, Any]) -> bool:
    """Whether `run`, from `describe_run`, had this run's parallel sizes."""
    return all(run["layout"].get(name) == getattr(plan.sizes, name) for name in LAYOUT)


def sharded_model_state_dict(model: list[Any], names: Names = lambda name: True) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of the parameters `names` of each chunk, without FP8's `_extra_state`."""
    keys, metadata = model_keys(len(model)), content_metadata(OPTIMIZER_SHARDING)
    state_dict = {}
    for index, (key, chunk) in enumerate(zip(keys, model, strict=True)):
        installed_engine().chunk_place(index, len(keys))
        sharded = unwrap(chunk).sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        kept = (name for name in sharded if not name.endswith("_extra_state") and names(name))
        state_dict[key] = {name: sharded[name] for name in kept}
    return state_dict


def sharded_objects(plan: Plan, training_state: TrainingState) -> list[ShardedObject]:
    """The state of each pipeline and tensor rank that is not in shards: random state and FP8 scales."""
    objects = [sharded_object("rng_state", [random_state()])]
    if has_fp8_state(plan.settings):
        objects.append(sharded_object("fp8_state", fp8_state(training_state.model)))
    return objects


def sharded_object(key: str, value: Any) -> ShardedObject:
    """`value` of this pipeline and tensor rank; data-parallel replicas hold the same, so the first one saves it."""
    pp, tp = (
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()),
        (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject(key, value, (pp[1], tp[1]), (pp[0], tp[0]), replica_id=replica)


def legacy_state_dict(
    training_state: TrainingState, sharding: str, *, with_rng: bool, with_fp8: bool
) -> dict[str, Any]:
    """What dist_checkpointing.load fills from a checkpoint whose optimizer is in an older layout, `sharding`."""
    initialize_optimizer_state(training_state)
    state = sharded_model_state_dict(training_state.model)
    state["optimizer"] = sharded_optimizer_state(training_state.optimizer, state, sharding)
    if with_rng:
        state["rng_state"] = sharded_object("rng_state", [random_state()])
    if with_fp8:
        state["fp8_state"] = sharded_object("fp8_state", fp8_state(training_state.model))
    return state


def load_model_state_dict(model: list[Any], state_dict: dict[str, Any], names: Names = lambda name: True) -> None:
    """Loads each chunk's parameters `names`, strictly: only Transformer Engine's `_extra_state` may differ.

    The optimizer's float32 master weights are not changed.
    """
    for key, chunk in zip(model_keys(len(model)), model, strict=True):
        missing, unexpected = unwrap(chunk).load_state_dict(state_dict[key], strict=False)
        missing = [name for name in missing if names(name)]
        wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
        if wrong:
            raise KitError(
                f"the checkpoint's {key} does not fit this model at {', '.join(wrong[:5])}"
                " (missing or unexpected): check config.json, TP, PP, VPP and TRANSFORMER_IMPL"
            )


def restore_scheduler_and_rng(plan: Plan, training_state: TrainingState, state_dict: dict[str, Any]) -> None:
    """Restores schedule, random state and FP8 scales; the last two only at the same parallel sizes."""
    restore_schedule(training_state.scheduler, state_dict["opt_param_scheduler"])
    rng = state_dict.get("rng_state")
    if rng is None:
        logger.info("random state not restored: the checkpoint was written at other parallel sizes")
    else:
        restore_random_state(rng[0] if isinstance(rng, list) else rng)
    if has_fp8_state(plan.settings):
        restore_fp8_state(training_state.model, state_dict.get("fp8_state"))
