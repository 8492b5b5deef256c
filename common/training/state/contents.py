"""What a run saves and goes on from: weights, optimizer, schedule, random state and the position in the data."""

from dataclasses import asdict
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject

from common.engine.dist_checkpointing import (
    OPTIMIZER_SHARDING,
    content_metadata,
    save_options,
    sharded_optimizer_state,
)
from common.engine.optimizer import make_optimizer_state
from common.engine.versions import installed_engine
from common.errors import KitError
from common.log import logger
from common.model.build import unwrap
from common.training.launching.process_group import random_state, restore_random_state
from common.training.planning.plan import Plan, Progress
from common.training.state.fp8_state import fp8_state, has_fp8_state, restore_fp8_state
from common.training.state.save_torch_dist import Content
from common.training.state.shards import Part, optimizer_state_parts, weight_parts
from common.training.state.training_state import TrainingState, optimizer_parts

LAYOUT = ("tp", "pp", "vpp", "cp", "dp")


def chunk_names(num_chunks: int) -> list[str]:
    """The keys of a rank's chunks in a checkpoint, as Megatron-LM names them: `model`, or `model0`, `model1`, ..."""
    return ["model"] if num_chunks == 1 else [f"model{index}" for index in range(num_chunks)]


def describe_run(plan: Plan, progress: Progress) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it; plain values, so that it loads with `weights_only`."""
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
    }


def model_shards(training_state: TrainingState) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of each chunk; `_extra_state` (FP8 scales) is left out."""
    names, metadata = chunk_names(len(training_state.model)), content_metadata(OPTIMIZER_SHARDING)
    shards = {}
    for index, (name, chunk) in enumerate(zip(names, training_state.model, strict=True)):
        installed_engine().chunk_place(index, len(names))
        shard = unwrap(chunk).sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        shards[name] = {key: value for key, value in shard.items() if not key.endswith("_extra_state")}
    return shards


def content_of(plan: Plan, training_state: TrainingState, progress: Progress) -> Content:
    """What this rank writes of a torch_dist checkpoint; no collective call."""
    if plan.settings.save_optimizer:
        need_optimizer_state(training_state)
    parts = saved_parts(plan, training_state)
    common: dict[str, Any] = {"iteration": progress.iteration, "checkpoint_version": 3.0} | save_options()
    common["run"] = describe_run(plan, progress)
    objects = {}
    if plan.settings.save_optimizer:
        groups = {"param_groups": saved_groups(training_state)}
        common["optimizer"] = {"optimizer": groups, "param_state_sharding_type": OPTIMIZER_SHARDING}
        common["opt_param_scheduler"] = training_state.scheduler.state_dict()
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            objects = {each.unique_key: each.data for each in rank_objects(training_state, plan)}
    return Content(parts, objects, common)


def saved_parts(plan: Plan, training_state: TrainingState) -> list[Part]:
    """The parts of weights and optimizer that this rank writes; the optimizer's state is there."""
    shards = model_shards(training_state)
    parts = list(weight_parts(training_state, shards, own=True))
    if plan.settings.save_optimizer:
        parts += optimizer_state_parts(training_state, shards)
    return [part for part in parts if part.saved_here]


def has_optimizer_state(training_state: TrainingState) -> bool:
    """Whether a step has given the optimizer its moments."""
    return any(part.optimizer.state for part in optimizer_parts(training_state.optimizer))


def rank_objects(training_state: TrainingState, plan: Plan) -> list[ShardedObject]:
    """What each pipeline and tensor rank has of its own beside tensors."""
    objects = [_sharded("rng_state", [random_state()])]
    if has_fp8_state(plan.settings):
        objects.append(_sharded("fp8_state", fp8_state(training_state.model)))
    return objects


def old_state(training_state: TrainingState, sharding: str, *, with_rng: bool, with_fp8: bool) -> dict[str, Any]:
    """What Megatron-Core's dist_checkpointing loads into, of an optimizer in a layout that is written no more."""
    initialise_optimizer(training_state)
    state = model_shards(training_state)
    state["optimizer"] = sharded_optimizer_state(training_state.optimizer, state, sharding)
    if with_rng:
        state["rng_state"] = _sharded("rng_state", [random_state()])
    return state | ({"fp8_state": _sharded("fp8_state", fp8_state(training_state.model))} if with_fp8 else {})


def saved_groups(training_state: TrainingState) -> list[dict[str, Any]]:
    """Adam's parameter groups without parameters, with the number of its steps in each.

    As DistributedOptimizer.state_dict gives them, which has Transformer Engine's Adam copy all bf16 moments to float32.
    """
    (optimizer,) = optimizer_parts(training_state.optimizer)
    adam = optimizer.optimizer
    groups = [{key: value for key, value in group.items() if key != "params"} for group in adam.param_groups]
    steps = {int(state["step"]) for state in adam.state.values() if "step" in state}
    steps = steps or {int(group["step"]) for group in groups if "step" in group}
    for group in groups:
        group["step"] = max(steps, default=0)
    return groups


def load_groups(training_state: TrainingState, saved: list[dict[str, Any]]) -> None:
    """Puts back what `saved_groups` gave; groups are told apart as DistributedOptimizer.load_state_dict does it."""
    (optimizer,) = optimizer_parts(training_state.optimizer)
    adam = optimizer.optimizer
    by_kind = {_kind(group): group for group in saved}
    for group in adam.param_groups:
        found = by_kind[_kind(group)]
        own_count = "step" in group or not any("step" in state for state in adam.state.values())
        group.update({key: value for key, value in found.items() if key != "step" or own_count})
        for param in group["params"]:
            if "step" in adam.state.get(param, {}):
                adam.state[param]["step"] = torch.tensor(float(found["step"]))


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in ("wd_mult", "lr_mult", "is_expert_parallel"))


def initialise_optimizer(training_state: TrainingState) -> None:
    """Gives the optimizer the moments it makes at its first step, so that they can be loaded into.

    A step on zero gradients with learning rate and weight decay 0 moves no weight.
    """
    if training_state.host_states:
        for host_state in training_state.host_states:
            host_state.make_moments()
        return
    for part in optimizer_parts(training_state.optimizer):
        groups = part.optimizer.param_groups
        kept = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        make_optimizer_state(part)
        for group, (lr, weight_decay) in zip(groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay


def need_optimizer_state(training_state: TrainingState) -> None:
    """Gives the optimizer the state of no step, where every step of the run so far was skipped: saving asks for one."""
    if has_optimizer_state(training_state):
        return
    initialise_optimizer(training_state)
    for part in optimizer_parts(training_state.optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0 * group["step"]


def _sharded(key: str, value: Any) -> ShardedObject:
    """A pipeline and tensor rank's own `value`; that of data-parallel replicas is alike, so the first one's is kept."""
    pp, tp = (
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()),
        (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject(key, value, (pp[1], tp[1]), (pp[0], tp[0]), replica_id=replica)


def same_layout(plan: Plan, run: dict[str, Any]) -> bool:
    """Whether `run`, as a checkpoint describes it, had this run's parallel sizes."""
    return all(run["layout"].get(name) == getattr(plan.sizes, name) for name in LAYOUT)


def finish_loading(training_state: TrainingState, state: dict[str, Any], plan: Plan) -> None:
    """Puts schedule and random state back; the random state only where the layout is the same."""
    training_state.scheduler.load_state_dict(dict(state["opt_param_scheduler"]))
    rng = state.get("rng_state")
    if rng is None:
        logger.info("random state not restored: the checkpoint was written at other parallel sizes")
    else:
        restore_random_state(rng[0] if isinstance(rng, list) else rng)
    if has_fp8_state(plan.settings):
        restore_fp8_state(training_state.model, state.get("fp8_state"))


def load_chunks(training_state: TrainingState, state: dict[str, Any]) -> None:
    """Loads each chunk's weights, strictly: only Transformer Engine's `_extra_state` may be absent or left over.

    The optimizer's float32 master weights stay as they are.
    """
    for name, chunk in zip(chunk_names(len(training_state.model)), training_state.model, strict=True):
        missing, unexpected = unwrap(chunk).load_state_dict(state[name], strict=False)
        wrong = [key for key in (*missing, *unexpected) if not key.endswith("_extra_state")]
        if wrong:
            raise KitError(
                f"the checkpoint's {name} does not fit this model at {', '.join(wrong[:5])}"
                " (missing or left over): check config.json, TP, PP, VPP and TRANSFORMER_IMPL"
            )
