"""The learning rate's schedule: its lengths, which are refused where the run has no room for them, and its words."""

from typing import Any, NamedTuple

from common.engine.versions import first_version_with, installed_engine
from common.errors import KitError
from common.training.settings import TrainSettings

WSD = "WSD"  # warm-up, stable, decay: MiniCPM, arXiv 2404.06395
INVERSE_SQRT = "inverse-square-root"


class ScheduleLengths(NamedTuple):
    """Lengths of a run's schedule in samples; decay: from the run's first step to its last; wsd_decay: of WSD alone."""

    decay: int
    warmup: int
    wsd_decay: int | None


def schedule_lengths(settings: TrainSettings, train_samples: int) -> ScheduleLengths:
    """The schedule of a run of `train_samples`; its last step begins at the end of `decay`."""
    batch = settings.global_batch_size
    decay = max(1, train_samples - batch)
    warmup = settings.lr_warmup_iters * batch or int(settings.lr_warmup_fraction * decay)
    iters = settings.lr_wsd_decay_iters
    return ScheduleLengths(decay, warmup, iters * batch if iters and settings.lr_decay_style == WSD else None)


def check_schedule(settings: TrainSettings, train_iters: int, train_samples: int) -> None:
    """Raises KitError where warm-up and decay do not fit into the run, or the engine lacks the decay's shape."""
    lengths = schedule_lengths(settings, train_samples)
    batch, run = settings.global_batch_size, f"the run has {train_iters} steps, the last at MIN_LR"
    if settings.lr_warmup_iters and lengths.warmup >= train_samples - batch:
        raise KitError(f"LR_WARMUP_ITERS={settings.lr_warmup_iters}: {run}: use fewer warm-up steps, or a longer run")
    if settings.lr_decay_style == INVERSE_SQRT and lengths.warmup < batch:
        raise KitError(
            f"LR_DECAY_STYLE={INVERSE_SQRT} with a warm-up of {lengths.warmup / batch:.2g} steps: its rate is LR x"
            " sqrt(warm-up / steps): set LR_WARMUP_ITERS to 1 or more"
        )
    if lengths.wsd_decay is None:
        return
    if lengths.wsd_decay > lengths.decay - lengths.warmup:
        most = (lengths.decay - lengths.warmup) // batch
        raise KitError(
            f"LR_WSD_DECAY_ITERS={settings.lr_wsd_decay_iters} after a warm-up of {lengths.warmup / batch:.4g} steps:"
            f" {run}: use at most {max(0, most)} decay steps, or a longer run"
        )
    check_decay_style(settings.lr_wsd_decay_style)


def check_decay_style(style: str) -> None:
    """Raises KitError if the installed engine lacks the shape of a decay; in a conversion it is the checkpoint's."""
    if style == "minus_sqrt" and not installed_engine().minus_sqrt_decay:
        since = first_version_with(lambda megatron: megatron.minus_sqrt_decay)
        raise KitError(
            f"LR_WSD_DECAY_STYLE={style} needs megatron-core {since} or later, this is"
            f" {installed_engine().release}: use exponential, linear or cosine"
        )


def check_resumed_decay(settings: TrainSettings, train_samples: int, consumed: int, saved: dict[str, Any]) -> None:
    """Raises KitError if WSD's decay would begin before the step that is resumed, unless it had begun there already.

    saved: the schedule in the checkpoint, which was written after `consumed` samples.
    """
    decay, batch = schedule_lengths(settings, train_samples).wsd_decay, settings.global_batch_size
    left = train_samples - consumed
    if decay is None or decay <= left:
        return
    saved_decay = saved.get("wsd_decay_steps")
    if saved_decay is not None and consumed - batch > saved["lr_decay_steps"] - saved_decay:
        return
    raise KitError(
        f"LR_WSD_DECAY_ITERS={settings.lr_wsd_decay_iters}: {left // batch} steps are left after the checkpoint, before"
        f" which no decay had begun, so the learning rate would jump: use at most {left // batch}, or a longer run"
    )


def describe_schedule(settings: TrainSettings, train_iters: int, train_samples: int) -> str:
    """The schedule as a line of the log."""
    lengths, batch = schedule_lengths(settings, train_samples), settings.global_batch_size
    parts = [f"warm-up of {lengths.warmup / batch:.4g} steps to {settings.lr:g}"] if lengths.warmup else []
    falls = f"to {settings.min_lr:g} in"
    parts.append({
        "constant": f"constant at {settings.lr:g}",
        INVERSE_SQRT: f"{INVERSE_SQRT}, not below {settings.min_lr:g}",
        WSD: f"constant at {settings.lr:g}, and {settings.lr_wsd_decay_style} {falls} the last"
        f" {settings.lr_wsd_decay_iters} of {train_iters} steps",
    }.get(settings.lr_decay_style, f"{settings.lr_decay_style} {falls} step {train_iters}"))  # fmt: skip
    return ", then ".join(parts)
