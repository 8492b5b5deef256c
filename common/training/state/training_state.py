"""The model made trainable: data parallelism, the distributed Adam and the learning-rate schedule."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from common.engine.overrides import named_refusals, overrides
from common.engine.patches import mend_training
from common.engine.transformer_engine import optimizer_state_options
from common.log import logger
from common.model.build import ModelOptions, build_model
from common.training.launching.hang_detector import Heartbeat
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings
from common.training.state.loss_weights import LossWeights
from common.training.state.optimizer_offload import HostState, check_host_memory, gradients_away


@dataclass(frozen=True)
class TrainingState:
    """What a step changes."""

    model: list[Any]  # DistributedDataParallel, one a virtual chunk
    optimizer: Any
    scheduler: OptimizerParamScheduler
    host_states: list[HostState] = field(default_factory=list)  # one a distributed optimizer, with OPTIMIZER_STATE=cpu
    loss_weights: LossWeights | None = None  # where weights are not all 0 or 1
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def config(self) -> Any:
        """Megatron-Core's TransformerConfig."""
        return self.model[0].config


def build_training_state(plan: Plan) -> TrainingState:
    """Model with random weights, optimizer and schedule of `plan` on this rank."""
    chosen = plan.settings
    options = ModelOptions(
        precision=chosen.precision,
        transformer_impl=plan.transformer_impl,
        recompute=chosen.recompute,
        recompute_num_layers=chosen.recompute_num_layers,
        sequence_parallel=chosen.sequence_parallel,
        tp_comm_overlap=chosen.tp_comm_overlap,
        fp8_format=chosen.fp8_format,
        fp8_recipe=chosen.fp8_recipe,
        core_attention=chosen.core_attention,
        fused_products=chosen.fused_products,
        deterministic=chosen.deterministic,
        mcore=chosen.mcore,
        joins_rows=plan.joins_rows,
        weighted=any(data.weighted for data in (plan.train, plan.valid) if data),
    )
    if chosen.tp_comm_overlap:
        open_tensor_parallel_buffers(plan)
    chunks = build_model(plan.qwen, plan.sizes, options, plan.platform, chosen.seq_length)
    model = wrap(chunks, chosen)
    mend_training()
    optimizer, host_states = build_optimizer(chosen, model)
    scheduler = build_scheduler(optimizer, chosen, plan.train_samples)
    weights = LossWeights(torch.device(plan.platform.device)) if plan.train and plan.train.weighted else None
    connect(model, optimizer, weights)
    return TrainingState(model, optimizer, scheduler, host_states, weights)


def build_optimizer(chosen: TrainSettings, model: list[Any]) -> tuple[Any, list[HostState]]:
    """Megatron-Core's optimizer over the distributed ones, and what holds their state with OPTIMIZER_STATE=cpu."""
    on_host = chosen.optimizer_state == "cpu"
    with gradients_away(model) if on_host else nullcontext():
        optimizer = get_megatron_optimizer(optimizer_config(chosen), model)
        parts = optimizer_parts(optimizer)
        if on_host:
            check_host_memory(parts)
        host_states = [HostState(part, PART) for part in parts] if on_host else []
    for state in host_states:
        step_in_parts(state.adam, PART // 2, state.in_turn)  # two parts are on the device together
    if chosen.optimizer_state == "bf16":
        for each in parts:
            step_in_parts(each.optimizer)
    # Megatron-Core takes the first that imports: Transformer Engine's, apex's, torch's.
    kind = type(parts[0].optimizer)
    where = ", its state in the host's memory" if on_host else ""
    logger.info("optimizer: %s.%s%s", kind.__module__, kind.__name__, where)
    return optimizer, host_states


def wrap(chunks: list[torch.nn.Module], chosen: TrainSettings) -> list[DistributedDataParallel]:
    """The chunks with float32 gradient buffers, reduced over the data-parallel ranks.

    Only the first chunk is cut into buckets: the other chunks' gradients wait for nothing (Megatron-LM
    training/training.py does the same).
    """
    reduce, gather = chosen.overlaps
    fields: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": reduce,
        "overlap_param_gather": gather,
        "bucket_size": 40_000_000 if reduce else None,
    }
    with named_refusals(chosen.mcore):
        config = DistributedDataParallelConfig(**{**fields, **overrides(chosen.mcore)["ddp"]})
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def optimizer_config(chosen: TrainSettings) -> OptimizerConfig:
    """Adam with decoupled weight decay, its state spread over the data-parallel ranks."""
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": chosen.lr,
        "min_lr": chosen.min_lr,
        "weight_decay": chosen.weight_decay,
        "adam_beta1": chosen.adam_beta1,
        "adam_beta2": chosen.adam_beta2,
        "adam_eps": chosen.adam_eps,
        "clip_grad": chosen.clip_grad,
        "bf16": chosen.precision == "bf16",
        "params_dtype": torch.bfloat16 if chosen.precision == "bf16" else torch.float32,
        "use_distributed_optimizer": True,
        **optimizer_state_options(chosen.optimizer_state),
    }
    with named_refusals(chosen.mcore):
        return OptimizerConfig(**{**fields, **overrides(chosen.mcore)["optimizer"]})


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The distributed optimizers inside Megatron-Core's chained one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


PART = 1 << 28  # parameters: 2 GiB of float32 moments
InTurn = Callable[[list[list[torch.Tensor]]], Iterable[list[torch.Tensor]]]


def step_in_parts(adam: torch.optim.Optimizer, part: int = PART, in_turn: InTurn = iter) -> None:
    """Has `adam` step through each parameter group in parts of `part` parameters, or of one tensor that has more.

    Each part when `in_turn` gives it.

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


def open_tensor_parallel_buffers(plan: Plan) -> None:
    """Gives Transformer Engine the buffers through which it sends while matrix products run.

    As Megatron-LM's training/initialize.py does, with one shape for the whole run: [s * b / cp, h].
    """
    from transformer_engine.pytorch.module.base import initialize_ub

    chosen = plan.settings
    rows = chosen.seq_length * chosen.micro_batch_size // chosen.cp
    fp8 = chosen.fp8_format != "none"
    initialize_ub(shape=[rows, plan.qwen.hidden_size], tp_size=chosen.tp, use_fp8=fp8, bootstrap_backend="nccl")


def gather_weights(model: list[Any]) -> None:
    """Makes every rank's weights those of the last step; a collective call, before anything but a step reads them.

    With OVERLAP_PARAM_GATHER a rank has the new weights of its own shard alone until the next forward pass
    (step_with_ready_grads in Megatron-Core's optimizer/distrib_optimizer.py).
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_scheduler(optimizer: Any, chosen: TrainSettings, train_samples: int) -> OptimizerParamScheduler:
    """The schedule, counted in samples, of a run of `train_samples`; its last step has MIN_LR.

    On resume the settings of the command win over the checkpoint's; a conversion keeps the checkpoint's.
    """
    batch = chosen.global_batch_size
    converting = chosen.train_or_convert_ckpt == "convert"
    decay = max(1, train_samples - batch)  # where the last step begins
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=chosen.lr,
        min_lr=chosen.min_lr,
        lr_warmup_steps=0 if converting else chosen.lr_warmup_iters * batch,
        lr_decay_steps=decay,
        lr_decay_style=chosen.lr_decay_style,
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=converting,
        override_opt_param_scheduler=not converting,
    )


def apply_settings(training_state: TrainingState, chosen: TrainSettings) -> list[str]:
    """Puts the command's learning rates, betas and epsilon in the place of a checkpoint's; what changed, in words.

    A loaded group brings its own, and Megatron-Core prefers them (get_lr in optimizer_param_scheduler.py).
    """
    given = {
        "max_lr": ("LR", chosen.lr), "min_lr": ("MIN_LR", chosen.min_lr), "eps": ("ADAM_EPS", chosen.adam_eps),
        "betas": ("ADAM_BETA1, ADAM_BETA2", (chosen.adam_beta1, chosen.adam_beta2)),
    }  # fmt: skip
    changed = {}
    for group in training_state.optimizer.param_groups:
        for key, (name, value) in given.items():
            before = tuple(group[key]) if isinstance(value, tuple) else group.get(key)
            if before != value:
                changed[name] = f"{name} {before} -> {value}"
            group[key] = value
    training_state.scheduler.step(0)
    return list(changed.values())


def connect(model: list[Any], optimizer: Any, loss_weights: LossWeights | None) -> None:
    """Tells Megatron-Core's schedules how to scale losses and when to reduce gradients."""
    config = model[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = loss_weights.finalize if loss_weights else finalize_model_grads
    if model[0].ddp_config.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in model]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
