"""The distributed Adam, with its state in float32, in bf16 or on the host."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from common.engine.overrides import named_refusals, overrides
from common.engine.transformer_engine import optimizer_state_options
from common.log import logger
from common.training.settings import TrainSettings
from common.training.state.master_weights import keep_remainders
from common.training.state.optimizer_offload import OffloadedState, check_host_memory, released_gradients


def build_optimizer(settings: TrainSettings, model: list[Any]) -> tuple[Any, list[OffloadedState]]:
    """Megatron-Core's optimizer, and the offloaded state of each distributed one with OPTIMIZER_STATE=cpu."""
    offload = settings.optimizer_state == "cpu"
    with released_gradients(model) if offload else nullcontext():
        optimizer = get_megatron_optimizer(optimizer_config(settings), model)
        parts = distributed_optimizers(optimizer)
        if offload:
            check_host_memory(parts)
        offloaded_states = [OffloadedState(part, PART) for part in parts] if offload else []
    for state in offloaded_states:
        step_in_parts(state.adam, PART // 2, state.on_device)  # two parts are on the device together
    if settings.optimizer_state == "bf16":
        for part in parts:
            step_in_parts(part.optimizer)
            keep_remainders(part)
    # Megatron-Core takes the first that imports: Transformer Engine's, apex's, torch's.
    kind = type(parts[0].optimizer)
    where = ", its state in host memory" if offload else ""
    logger.info("optimizer: %s.%s%s", kind.__module__, kind.__name__, where)
    return optimizer, offloaded_states


def optimizer_config(settings: TrainSettings) -> OptimizerConfig:
    """Adam with decoupled weight decay, its state sharded over the data-parallel ranks."""
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": settings.lr,
        "min_lr": settings.min_lr,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_eps": settings.adam_eps,
        "clip_grad": settings.clip_grad,
        "bf16": settings.precision == "bf16",
        "params_dtype": torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        "use_distributed_optimizer": True,
        **optimizer_state_options(settings.optimizer_state),
    }
    with named_refusals(settings.mcore):
        return OptimizerConfig(**{**fields, **overrides(settings.mcore)["optimizer"]})


def distributed_optimizers(optimizer: Any) -> list[Any]:
    """The DistributedOptimizers inside Megatron-Core's ChainedOptimizer."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


PART = 1 << 28  # parameters: 2 GiB of float32 moments
InTurn = Callable[[list[list[torch.Tensor]]], Iterable[list[torch.Tensor]]]


def step_in_parts(adam: torch.optim.Optimizer, part: int = PART, in_turn: InTurn = iter) -> None:
    """Has `adam` step through each parameter group in parts of `part` parameters, or of one tensor that has more.

    `in_turn` iterates over the parts, for example to move their state.

    Transformer Engine's FusedAdam turns the bf16 moments of a whole group into float32 at once (get_unscaled_state in
    its optimizers/fused_adam.py, 2.11): 61 GB for Qwen2.5-7B, more than bf16 saves.
    """
    step = adam.step

    def stepped(*args: Any, **kwargs: Any) -> None:
        groups = adam.param_groups
        try:
            for group in groups:
                taken = group
                for params in in_turn(_parts(group["params"], part)):
                    taken = {**group, "params": params}  # a group counts its own steps
                    adam.param_groups = [taken]
                    step(*args, **kwargs)
                group.update({name: value for name, value in taken.items() if name != "params"})
        finally:
            adam.param_groups = groups

    adam.step = stepped  # type: ignore[method-assign, assignment]


def _parts(params: list[torch.Tensor], part: int) -> list[list[torch.Tensor]]:
    parts: list[list[torch.Tensor]] = []
    filled = part
    for param in params:
        if filled + param.numel() > part:
            parts.append([])
            filled = 0
        parts[-1].append(param)
        filled += param.numel()
    return parts
