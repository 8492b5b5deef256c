"""The learning-rate schedule, Megatron-Core's OptimizerParamScheduler."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from common.training.settings import TrainSettings


def build_scheduler(optimizer: Any, settings: TrainSettings, train_samples: int) -> OptimizerParamScheduler:
    """The schedule, counted in samples, of a run of `train_samples`; its last step has MIN_LR.

    On resume the command's settings override the checkpoint's; a conversion keeps the checkpoint's.
    """
    batch = settings.global_batch_size
    converting = settings.train_or_convert_ckpt == "convert"
    decay = max(1, train_samples - batch)  # where the last step begins
    warmup = settings.lr_warmup_iters * batch or int(settings.lr_warmup_fraction * decay)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=0 if converting else warmup,
        lr_decay_steps=decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=converting,
        override_opt_param_scheduler=not converting,
    )


def override_checkpoint_settings(
    optimizer: Any, scheduler: OptimizerParamScheduler, settings: TrainSettings
) -> list[str]:
    """Replaces a checkpoint's learning rates, betas and epsilon by the command's; returns the changes, for the log.

    A loaded parameter group has its own, which Megatron-Core prefers (get_lr in optimizer_param_scheduler.py).
    """
    values = {
        "max_lr": ("LR", settings.lr), "min_lr": ("MIN_LR", settings.min_lr), "eps": ("ADAM_EPS", settings.adam_eps),
        "betas": ("ADAM_BETA1, ADAM_BETA2", (settings.adam_beta1, settings.adam_beta2)),
    }  # fmt: skip
    changes = {}
    for group in optimizer.param_groups:
        for key, (name, value) in values.items():
            before = tuple(group[key]) if isinstance(value, tuple) else group.get(key)
            if before != value:
                changes[name] = f"{name} {before} -> {value}"
            group[key] = value
    scheduler.step(0)
    return list(changes.values())
