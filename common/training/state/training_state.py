"""The training state of a rank: the model in DistributedDataParallel, the optimizer and the learning-rate schedule."""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from common.engine.patches import patch_training
from common.engine.versions import installed_engine
from common.model.build import ModelOptions, build_model
from common.training.launching.hang_detector import Heartbeat
from common.training.launching.process_group import new_data_group
from common.training.planning.plan import Plan
from common.training.state.data_parallel import wrap_model
from common.training.state.freezing import freeze
from common.training.state.loss_weights import LossWeights
from common.training.state.optimizer import build_optimizer
from common.training.state.optimizer_offload import OffloadedState
from common.training.state.scheduler import build_scheduler
from common.training.state.step_times import REDUCTION, StepTimes
from common.training.state.tp_comm_overlap import initialize_tp_communicators


@dataclass(frozen=True)
class TrainingState:
    """What a training step updates."""

    model: list[Any]  # DistributedDataParallel, one per virtual pipeline chunk
    optimizer: Any
    scheduler: OptimizerParamScheduler
    offloaded_states: list[OffloadedState] = field(default_factory=list)  # per distributed optimizer, if offloaded
    loss_weights: LossWeights | None = None  # only for weights other than 0 and 1
    references: torch.Tensor | None = None  # log-probabilities of all pairs' answers under the reference, on the CPU
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    data_group: Any = None  # gloo, of the tensor-parallel group, over which its first rank sends micro-batches
    times: StepTimes = field(default_factory=StepTimes)


def build_training_state(plan: Plan) -> TrainingState:
    """Model with random weights, optimizer and schedule of `plan` on this rank."""
    settings = plan.settings
    if settings.tp_comm_overlap == "true":
        initialize_tp_communicators(settings, plan.qwen.hidden_size)
    chunks = build_model(plan.qwen, plan.sizes, model_options(plan), plan.platform, settings.seq_length)
    freeze(chunks, plan.frozen)
    model = wrap_model(chunks, settings)
    patch_training()
    optimizer, offloaded_states = build_optimizer(settings, model)
    scheduler = build_scheduler(optimizer, settings, plan.train_samples)
    weights = LossWeights(torch.device(plan.platform.device)) if plan.train and plan.train.weighted else None
    times = StepTimes(plan.platform.device)
    set_schedule_functions(model, optimizer, weights, times)
    group = new_data_group(plan.sizes, settings.distributed_timeout_min) if plan.train else None
    return TrainingState(model, optimizer, scheduler, offloaded_states, weights, times=times, data_group=group)


def model_options(plan: Plan) -> ModelOptions:
    """The settings of `plan` that the model is built with."""
    settings = plan.settings
    return ModelOptions(
        precision=settings.precision,
        transformer_impl=plan.transformer_impl,
        recompute=settings.recompute,
        recompute_num_layers=settings.recompute_num_layers,
        sequence_parallel=settings.sequence_parallel,
        tp_comm_overlap=settings.tp_comm_overlap,
        fp8_format=settings.fp8_format,
        fp8_recipe=settings.fp8_recipe,
        core_attention=settings.core_attention,
        fused_products=settings.fused_products,
        deterministic=settings.deterministic,
        mcore=settings.mcore,
        lora=plan.adapters.lora if plan.adapters else None,
        seed=settings.seed,
        separate_documents=plan.separate_documents,
        packed_sequences=plan.packed_sequences,
        per_token_gradients=settings.train_mode == "dpo",
        weighted=any(data.weighted for data in (plan.train, plan.valid) if data),
    )


def set_schedule_functions(
    model: list[Any], optimizer: Any, loss_weights: LossWeights | None, times: StepTimes
) -> None:
    """Sets the functions of the model's config with which Megatron-Core's schedules scale losses and reduce gradients.

    As `train` does in Megatron-LM's training/training.py.
    """
    config = model[0].config
    config.grad_scale_func = optimizer.scale_loss
    finalize = loss_weights.finalize if loss_weights else installed_engine().finalize_model_grads

    def timed_finalize(*args: Any, **kwargs: Any) -> None:
        times.begin(REDUCTION)
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = timed_finalize
    if model[0].ddp_config.overlap_grad_reduce:
        no_sync_funcs = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync_funcs if len(no_sync_funcs) > 1 else no_sync_funcs[0]
