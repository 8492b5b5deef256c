"""The model made trainable: data parallelism, the distributed Adam and the learning-rate schedule."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from common.mcore import mend_torch_adam_step
from common.model.build import ModelOptions, build_model
from common.training.config import TrainSettings
from common.training.plan import Plan


@dataclass(frozen=True)
class Trainee:
    """What a step changes."""

    model: list[Any]  # DistributedDataParallel, one a virtual chunk
    optimizer: Any
    scheduler: OptimizerParamScheduler

    @property
    def config(self) -> Any:
        """Megatron-Core's TransformerConfig."""
        return self.model[0].config


def build_trainee(plan: Plan) -> Trainee:
    """Model with random weights, optimizer and schedule of `plan` on this rank."""
    chosen = plan.settings
    options = ModelOptions(
        precision=chosen.precision,
        transformer_impl=plan.transformer_impl,
        recompute=chosen.recompute,
        sequence_parallel=chosen.sequence_parallel,
    )
    chunks = build_model(plan.qwen, plan.sizes, options, plan.platform, chosen.seq_length)
    model = wrap(chunks, overlap=plan.platform.device == "cuda" and plan.sizes.dp > 1)
    mend_torch_adam_step()
    optimizer = get_megatron_optimizer(optimizer_config(chosen), model)
    scheduler = build_scheduler(optimizer, chosen, max(plan.train_iters, 1))
    connect(model, optimizer)
    return Trainee(model, optimizer, scheduler)


def wrap(chunks: list[torch.nn.Module], overlap: bool) -> list[DistributedDataParallel]:
    """The chunks with float32 gradient buffers, reduced over the data-parallel ranks.

    `overlap` sends gradients during backward and parameters during forward. Only the first chunk is cut into
    buckets: the other chunks' gradients wait for nothing (Megatron-LM training/training.py does the same).
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=40_000_000 if overlap else None,
    )
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def optimizer_config(chosen: TrainSettings) -> OptimizerConfig:
    """Adam with decoupled weight decay, its state spread over the data-parallel ranks."""
    return OptimizerConfig(
        optimizer="adam",
        lr=chosen.lr,
        min_lr=chosen.min_lr,
        weight_decay=chosen.weight_decay,
        adam_beta1=chosen.adam_beta1,
        adam_beta2=chosen.adam_beta2,
        clip_grad=chosen.clip_grad,
        bf16=chosen.precision == "bf16",
        params_dtype=torch.bfloat16 if chosen.precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
    )


def build_scheduler(optimizer: Any, chosen: TrainSettings, train_iters: int) -> OptimizerParamScheduler:
    """The schedule, counted in samples.

    On resume the settings of the command win over the checkpoint's; a conversion keeps the checkpoint's.
    """
    batch = chosen.global_batch_size
    converting = chosen.train_or_convert_ckpt == "convert"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=chosen.lr,
        min_lr=chosen.min_lr,
        lr_warmup_steps=min(chosen.lr_warmup_iters, train_iters - 1) * batch,
        lr_decay_steps=train_iters * batch,
        lr_decay_style=chosen.lr_decay_style,
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=train_iters * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=converting,
        override_opt_param_scheduler=not converting,
    )


def connect(model: list[Any], optimizer: Any) -> None:
    """Tells Megatron-Core's schedules how to scale losses and when to reduce gradients."""
    config = model[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if model[0].ddp_config.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in model]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
