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
from common.training.settings.optimizer import OFFLOADED
from common.training.state.master_weights import keep_remainders
from common.training.state.offload_memory import check_host_memory
from common.training.state.optimizer_offload import OffloadedState, released_gradients


def build_optimizer(settings: TrainSettings, model: list[Any]) -> tuple[Any, list[OffloadedState]]:
    """Megatron-Core's optimizer, and with OPTIMIZER_STATE=cpu or cpu_bf16 the state of each distributed one."""
    offload = settings.optimizer_state in OFFLOADED
    with released_gradients(model) if offload else nullcontext():
        optimizer = get_megatron_optimizer(optimizer_config(settings), model)
        parts = distributed_optimizers(optimizer)
        if offload:
            check_host_memory(parts, settings.optimizer_state)
        offloaded_states = [OffloadedState(part, settings.optimizer_state) for part in parts] if offload else []
    for state in offloaded_states:
        step_in_parts(state.adam, state.on_device)
    if settings.optimizer_state == "bf16":
        for part in parts:
            step_in_parts(part.optimizer, parts_of)
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
Params = list[torch.Tensor]


def step_in_parts(adam: torch.optim.Optimizer, parts: Callable[[Params], Iterable[Params]]) -> None:
    """Has `adam` step through each parameter group in parts, those that `parts` yields of the group's parameters.

    Transformer Engine's FusedAdam turns the bf16 moments of a whole group into float32 at once (get_unscaled_state in
    its optimizers/fused_adam.py, 2.11): 61 GB for Qwen2.5-7B, more than bf16 saves.
    """
    step = adam.step

    def stepped(*args: Any, **kwargs: Any) -> None:
        groups = adam.param_groups
        try:
            for group in groups:
                taken = group
                for params in parts(group["params"]):
                    taken = {**group, "params": params}  # a group counts its own steps
                    adam.param_groups = [taken]
                    step(*args, **kwargs)
                group.update({name: value for name, value in taken.items() if name != "params"})
        finally:
            adam.param_groups = groups

    adam.step = stepped  # type: ignore[method-assign, assignment]


def parts_of(params: Params, part: int = PART) -> list[Params]:
    """`params` in parts of at most `part` parameters, or of one tensor that has more."""
    parts: list[Params] = []
    filled = part
    for param in params:
        if filled + param.numel() > part:
            parts.append([])
            filled = 0
        parts[-1].append(param)
        filled += param.numel()
    return parts
