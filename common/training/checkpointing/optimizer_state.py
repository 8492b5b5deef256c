"""Adam's state in checkpoints: its parameter groups, and the moments to load into before the first step."""

from typing import Any

import torch

from common.engine.optimizer import make_optimizer_state
from common.training.state.optimizer import distributed_optimizers
from common.training.state.training_state import TrainingState


def has_optimizer_state(training_state: TrainingState) -> bool:
    """Whether the optimizer has moments, which the first step creates."""
    return any(part.optimizer.state for part in distributed_optimizers(training_state.optimizer))


def initialize_optimizer_state(training_state: TrainingState) -> None:
    """Creates the optimizer's moments, so that a checkpoint can be loaded into them.

    A step on zero gradients with learning rate and weight decay 0 changes no weight.
    """
    if training_state.offloaded_states:
        for offloaded in training_state.offloaded_states:
            offloaded.initialize_moments()
        return
    for part in distributed_optimizers(training_state.optimizer):
        groups = part.optimizer.param_groups
        saved = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        make_optimizer_state(part)
        for group, (lr, weight_decay) in zip(groups, saved, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay


def ensure_optimizer_state(training_state: TrainingState) -> None:
    """Creates the state of an optimizer at step 0 if every step so far was skipped, since saving needs one."""
    if has_optimizer_state(training_state):
        return
    initialize_optimizer_state(training_state)
    for part in distributed_optimizers(training_state.optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0 * group["step"]


def param_groups_to_save(training_state: TrainingState) -> list[dict[str, Any]]:
    """Adam's parameter groups without parameters, each with its number of steps.

    As in DistributedOptimizer.state_dict, which makes Transformer Engine's Adam copy all bf16 moments to float32.
    """
    (optimizer,) = distributed_optimizers(training_state.optimizer)
    adam = optimizer.optimizer
    groups = [{key: value for key, value in group.items() if key != "params"} for group in adam.param_groups]
    steps = {int(state["step"]) for state in adam.state.values() if "step" in state}
    steps = steps or {int(group["step"]) for group in groups if "step" in group}
    for group in groups:
        group["step"] = max(steps, default=0)
    return groups


def load_param_groups(training_state: TrainingState, saved: list[dict[str, Any]]) -> None:
    """Loads what `param_groups_to_save` returned; matches groups as DistributedOptimizer.load_state_dict does."""
    (optimizer,) = distributed_optimizers(training_state.optimizer)
    adam = optimizer.optimizer
    saved_by_kind = {_kind(group): group for group in saved}
    for group in adam.param_groups:
        source = saved_by_kind[_kind(group)]
        counts_steps = "step" in group or not any("step" in state for state in adam.state.values())
        group.update({key: value for key, value in source.items() if key != "step" or counts_steps})
        for param in group["params"]:
            if "step" in adam.state.get(param, {}):
                adam.state[param]["step"] = torch.tensor(float(source["step"]))


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in ("wd_mult", "lr_mult", "is_expert_parallel"))
