"""The learning-rate schedule, Megatron-Core's OptimizerParamScheduler."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from common.training.planning.schedule import WSD, check_decay_style, schedule_lengths
from common.training.settings import TrainSettings


def build_scheduler(optimizer: Any, settings: TrainSettings, train_samples: int) -> OptimizerParamScheduler:
    """The schedule, counted in samples, of a run of `train_samples`; its last step has MIN_LR.

    On resume the command's settings override the checkpoint's; a conversion keeps the checkpoint's.
    """
    converting = settings.train_or_convert_ckpt == "convert"
    lengths = schedule_lengths(settings, train_samples)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=0 if converting else lengths.warmup,
        lr_decay_steps=lengths.decay,
        lr_decay_style="constant" if converting else settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=lengths.decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=converting,
        override_opt_param_scheduler=not converting,
        wsd_decay_steps=lengths.wsd_decay,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def schedule_state(scheduler: OptimizerParamScheduler) -> dict[str, Any]:
    """What a checkpoint holds of the schedule: Megatron-Core's state, and WSD's decay, which that lacks."""
    names = ("wsd_decay_steps", "lr_wsd_decay_style") if scheduler.lr_decay_style == WSD else ()
    return {**scheduler.state_dict(), **{name: getattr(scheduler, name) for name in names}}


def restore_schedule(scheduler: OptimizerParamScheduler, state: dict[str, Any]) -> None:
    """Restores `schedule_state`: where the run is in it, and in a conversion also its settings."""
    if scheduler.use_checkpoint_opt_param_scheduler:
        scheduler.wsd_decay_steps = state.get("wsd_decay_steps")
        scheduler.lr_wsd_decay_style = state.get("lr_wsd_decay_style")
        check_decay_style(scheduler.lr_wsd_decay_style or "")
    scheduler.load_state_dict(dict(state))


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
