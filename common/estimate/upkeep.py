"""What checkpoints and faults cost a run: bytes, seconds, the best SAVE_INTERVAL."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from common.checkpoint.formats.checkpoint_size import checkpoint_bytes
from common.estimate.goodput import Interruptions, best_interval, best_steps, seconds_between_faults, shares
from common.estimate.layouts import EstimateSettings
from common.model.shape.config import QwenConfig

GB = 1e9
COPY_GB_S = 48  # from a GPU to pinned memory: 43.2 GB of Qwen2.5-3B in 0.9 s on an H200 (docs/benchmarks.md)
UNITS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


@dataclass(frozen=True)
class Upkeep:
    """The size of a torch_dist checkpoint with the optimizer, and the time lost to saves and faults."""

    settings: EstimateSettings
    num_bytes: int
    lost: Interruptions

    @property
    def disk_seconds(self) -> float:
        """Seconds to write or read a checkpoint."""
        return self.num_bytes / (self.settings.disk_gb_s * GB)

    @property
    def copy_bytes(self) -> int:
        """Bytes of host memory that ASYNC_SAVE needs per GPU; pipeline stages differ little."""
        return self.num_bytes // (self.settings.gpus * self.settings.nnodes)

    @property
    def disk_bytes(self) -> int | None:
        """Bytes on disk: the kept checkpoints and the one being written; None if all are kept."""
        return (self.settings.keep_checkpoints + 1) * self.num_bytes if self.settings.keep_checkpoints else None


def upkeep(settings: EstimateSettings, qwen: QwenConfig) -> Upkeep:
    """The upkeep of a run, the same for each layout; reading a checkpoint takes as long as writing it."""
    num_bytes = checkpoint_bytes(qwen, settings.precision, optimizer_state=settings.optimizer_state, lora=settings.lora)
    write = num_bytes / (settings.disk_gb_s * GB)
    stall = write if settings.save_stall_s is None else settings.save_stall_s
    between = seconds_between_faults(settings.gpus * settings.nnodes, settings.gpu_mtbf_hours)
    recovery = settings.detection_s + settings.restart_s + write
    return Upkeep(settings, num_bytes, Interruptions(between, stall, max(write, stall), recovery))


def span(seconds: float) -> str:
    """`seconds` with three digits in the largest unit of which there are at least 1.5."""
    name, unit = next((each for each in UNITS if seconds >= 1.5 * each[1]), UNITS[-1])
    amount = seconds / unit
    return f"{amount:,.0f} {name}" if amount >= 100 else f"{amount:.3g} {name}"


def upkeep_lines(kept: Upkeep, step_seconds: float | None) -> Iterator[str]:
    """The lines of the report; with the best SAVE_INTERVAL if the seconds of a step are known."""
    settings, lost = kept.settings, kept.lost
    need = f" and the next one need {kept.disk_bytes / GB:,.1f} GB" if kept.disk_bytes else ""
    yield (
        f"a checkpoint: {kept.num_bytes / GB:,.1f} GB with the optimizer;"
        f" KEEP_CHECKPOINTS={settings.keep_checkpoints}{need}"
    )
    pause = "meanwhile" if settings.save_stall_s is None else f"for {span(lost.stall)}"
    yield (
        f"  written in {span(kept.disk_seconds)}, read in the same time (--disk-gb-s={settings.disk_gb_s:g}); training"
        f" is paused {pause} (--save-stall-s)"
    )
    yield (
        f"  ASYNC_SAVE=true: {kept.copy_bytes / GB:,.1f} GB of host memory per GPU, training is paused only for the"
        f" copy, about {span(kept.copy_bytes / (COPY_GB_S * GB))} (--save-stall-s); neither takes GPU memory"
    )
    world = settings.gpus * settings.nnodes
    yield (
        f"  {world} GPU{'s have' if world > 1 else ' has'} a fault every {span(lost.between_faults)} (--gpu-mtbf-hours="
        f"{settings.gpu_mtbf_hours:,.0f}), detected in {span(settings.detection_s)}; restarted in"
        f" {span(settings.restart_s)}"
    )
    yield f"  {_best(kept, step_seconds)}; preemptions and stops are not counted"


def _best(kept: Upkeep, step_seconds: float | None) -> str:
    if step_seconds is None:
        interval = best_interval(kept.lost)
        return f"best: {span(interval)} from save to save: goodput {shares(kept.lost, interval).trains:.1%}"
    values = upkeep_values(kept, step_seconds)
    best = values["best_save_interval"]
    return (
        f"best: SAVE_INTERVAL={best} ({span(best * step_seconds)} of the first layout's steps): goodput"
        f" {values['best_goodput']:.1%}, and {values['goodput']:.1%} with {kept.settings.save_interval}"
    )


def upkeep_values(kept: Upkeep, step_seconds: float | None) -> dict[str, Any]:
    """The best SAVE_INTERVAL, and the goodput with it and with the configured one."""
    if step_seconds is None:
        return dict.fromkeys(("best_save_interval", "best_goodput", "goodput"))
    best = best_steps(kept.lost, step_seconds)
    return {
        "best_save_interval": best,
        "best_goodput": shares(kept.lost, best * step_seconds).trains,
        "goodput": shares(kept.lost, kept.settings.save_interval * step_seconds).trains,
    }


def checkpoint_values(kept: Upkeep) -> dict[str, Any]:
    """Values that hold for every layout, in bytes and seconds."""
    interval = best_interval(kept.lost)
    return {
        "bytes": kept.num_bytes,
        "disk_bytes": kept.disk_bytes,
        "host_bytes_per_gpu": kept.copy_bytes,
        **{f"{name}_s": value for name, value in asdict(kept.lost).items()},
        "best_interval_s": interval,
        "best_goodput": shares(kept.lost, interval).trains,
    }
