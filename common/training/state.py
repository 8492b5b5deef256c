"""What a run saves and goes on from: weights, optimizer, schedule, random state and the position in the data."""

from dataclasses import asdict
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject

from common.errors import KitError
from common.log import logger
from common.mcore import (
    chunk_place,
    content_metadata,
    make_optimizer_state,
    optimizer_sharding,
    sharded_optimizer_state,
)
from common.model.build import unwrap
from common.training.distributed import random_state, restore_random_state
from common.training.fp8_state import fp8_state, has_fp8_state, restore_fp8_state
from common.training.optimizer import Trainee, optimizer_parts
from common.training.plan import Plan, Progress

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
        "optimizer_sharding": optimizer_sharding(),
        "data": data,
        "optimizer": plan.settings.save_optimizer,
        "fp8_state": has_fp8_state(plan.settings),
        "precision": plan.settings.precision,
    }


def model_shards(trainee: Trainee) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of each chunk; `_extra_state` (FP8 scales) is left out."""
    names, metadata = chunk_names(len(trainee.model)), content_metadata(optimizer_sharding())
    shards = {}
    for index, (name, chunk) in enumerate(zip(names, trainee.model, strict=True)):
        chunk_place(index, len(names))
        shard = unwrap(chunk).sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        shards[name] = {key: value for key, value in shard.items() if not key.endswith("_extra_state")}
    return shards


def sharded_state(
    trainee: Trainee, *, loading: bool, sharding: str | None = None, with_rng: bool = True, with_fp8: bool = False
) -> dict[str, Any]:
    """The whole state as Megatron-Core's dist_checkpointing saves and loads it, the optimizer in layout `sharding`."""
    if loading:
        initialise_optimizer(trainee)
    else:
        need_optimizer_state(trainee)
    state = model_shards(trainee)
    sharding = sharding or optimizer_sharding()
    state["optimizer"] = sharded_optimizer_state(trainee.optimizer, state, sharding, loading=loading)
    if with_rng:
        state["rng_state"] = _sharded("rng_state", [random_state()])
    if with_fp8:
        state["fp8_state"] = _sharded("fp8_state", fp8_state(trainee.model))
    if not loading:
        state["opt_param_scheduler"] = trainee.scheduler.state_dict()
    return state


def initialise_optimizer(trainee: Trainee) -> None:
    """Gives the optimizer the moments it makes at its first step, so that they can be loaded into.

    A step on zero gradients with learning rate and weight decay 0 moves no weight.
    """
    if trainee.host_states:
        for host_state in trainee.host_states:
            host_state.make_moments()
        return
    for part in optimizer_parts(trainee.optimizer):
        groups = part.optimizer.param_groups
        kept = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        make_optimizer_state(part)
        for group, (lr, weight_decay) in zip(groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay


def need_optimizer_state(trainee: Trainee) -> None:
    """Gives the optimizer the state of no step, where every step of the run so far was skipped: saving asks for one."""
    parts = optimizer_parts(trainee.optimizer)
    if any(part.optimizer.state for part in parts):
        return
    initialise_optimizer(trainee)
    for part in parts:
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


def finish_loading(trainee: Trainee, state: dict[str, Any], plan: Plan) -> None:
    """Puts schedule and random state back; the random state only where the layout is the same."""
    trainee.scheduler.load_state_dict(dict(state["opt_param_scheduler"]))
    rng = state.get("rng_state")
    if rng is None:
        logger.info("random state not restored: the checkpoint was written at other parallel sizes")
    else:
        restore_random_state(rng[0] if isinstance(rng, list) else rng)
    if has_fp8_state(plan.settings):
        restore_fp8_state(trainee.model, state.get("fp8_state"))


def load_chunks(trainee: Trainee, state: dict[str, Any]) -> None:
    """Loads each chunk's weights, strictly: only Transformer Engine's `_extra_state` may be absent or left over.

    The optimizer's float32 master weights stay as they are.
    """
    for name, chunk in zip(chunk_names(len(trainee.model)), trainee.model, strict=True):
        missing, unexpected = unwrap(chunk).load_state_dict(state[name], strict=False)
        wrong = [key for key in (*missing, *unexpected) if not key.endswith("_extra_state")]
        if wrong:
            raise KitError(
                f"the checkpoint's {name} does not fit this model at {', '.join(wrong[:5])}"
                " (missing or left over): check config.json, TP, PP, VPP and TRANSFORMER_IMPL"
            )
