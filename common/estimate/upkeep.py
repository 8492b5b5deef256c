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
    """A checkpoint of the run, in torch_dist with the optimizer, and the time lost to saves and faults."""

    asked: EstimateSettings
    num_bytes: int
    lost: Interruptions

    @property
    def disk_seconds(self) -> float:
        """Seconds to write or read a checkpoint."""
        return self.num_bytes / (self.asked.disk_gb_s * GB)

    @property
    def copy_bytes(self) -> int:
        """Bytes of host memory that ASYNC_SAVE needs per GPU; pipeline stages differ little."""
        return self.num_bytes // (self.asked.gpus * self.asked.nnodes)

    @property
    def disk_bytes(self) -> int | None:
        """Bytes on disk: the kept checkpoints and the one being written; None if all are kept."""
        return (self.asked.keep_checkpoints + 1) * self.num_bytes if self.asked.keep_checkpoints else None


def upkeep(asked: EstimateSettings, qwen: QwenConfig) -> Upkeep:
    """The upkeep of a run, the same for each layout; a checkpoint is read as fast as it is written, and once."""
    num_bytes = checkpoint_bytes(qwen, asked.precision, optimizer_state=asked.optimizer_state)
    write = num_bytes / (asked.disk_gb_s * GB)
    stall = write if asked.save_stall_s is None else asked.save_stall_s
    between = seconds_between_faults(asked.gpus * asked.nnodes, asked.gpu_mtbf_hours)
    recovery = asked.detection_s + asked.restart_s + write
    return Upkeep(asked, num_bytes, Interruptions(between, stall, max(write, stall), recovery))


def span(seconds: float) -> str:
    """`seconds` in the largest unit of which there are 1.5 or more, in three digits or whole."""
    name, unit = next((each for each in UNITS if seconds >= 1.5 * each[1]), UNITS[-1])
    amount = seconds / unit
    return f"{amount:,.0f} {name}" if amount >= 100 else f"{amount:.3g} {name}"


def upkeep_lines(kept: Upkeep, step_seconds: float | None) -> Iterator[str]:
    """The lines for people; SAVE_INTERVAL where the seconds of a step are given."""
    asked, lost = kept.asked, kept.lost
    need = (
        f"={asked.keep_checkpoints} and the next one need {kept.disk_bytes / GB:,.1f} GB" if kept.disk_bytes else "=0"
    )
    yield f"a checkpoint: {kept.num_bytes / GB:,.1f} GB with the optimizer; KEEP_CHECKPOINTS{need}"
    stands = "as long" if asked.save_stall_s is None else f"for {span(lost.stall)}"
    yield (
        f"  written in {span(kept.disk_seconds)}, read in as many (--disk-gb-s={asked.disk_gb_s:g}); training stands"
        f" still {stands} (--save-stall-s)"
    )
    yield (
        f"  ASYNC_SAVE=true: {kept.copy_bytes / GB:,.1f} GB of host memory a GPU, training stands still for the copy"
        f" alone, about {span(kept.copy_bytes / (COPY_GB_S * GB))} (--save-stall-s); neither takes memory of a GPU"
    )
    world = asked.gpus * asked.nnodes
    yield (
        f"  {world} GPU{'s have' if world > 1 else ' has'} a fault in {span(lost.between_faults)} (--gpu-mtbf-hours="
        f"{asked.gpu_mtbf_hours:,.0f}), seen in {span(asked.detection_s)}; restarted in {span(asked.restart_s)}"
    )
    yield f"  {_best(kept, step_seconds)}; preemptions and stops are not counted"


def _best(kept: Upkeep, step_seconds: float | None) -> str:
    if step_seconds is None:
        interval = best_interval(kept.lost)
        return f"best: {span(interval)} from save to save: {shares(kept.lost, interval).trains:.1%} of the time trains"
    told = upkeep_values(kept, step_seconds)
    best = told["best_save_interval"]
    return (
        f"best: SAVE_INTERVAL={best} ({span(best * step_seconds)} of the first layout's steps): {told['trains']:.1%} of"
        f" the time trains; with {kept.asked.save_interval} {told['trains_as_asked']:.1%}"
    )


def upkeep_values(kept: Upkeep, step_seconds: float | None) -> dict[str, Any]:
    """The best SAVE_INTERVAL, and the goodput with it and with the configured one."""
    if step_seconds is None:
        return dict.fromkeys(("best_save_interval", "trains", "trains_as_asked"))
    best = best_steps(kept.lost, step_seconds)
    return {
        "best_save_interval": best,
        "trains": shares(kept.lost, best * step_seconds).trains,
        "trains_as_asked": shares(kept.lost, kept.asked.save_interval * step_seconds).trains,
    }


def checkpoint_values(kept: Upkeep) -> dict[str, Any]:
    """Values that hold for every layout, in bytes and seconds."""
    interval = best_interval(kept.lost)
    return {
        "bytes": kept.num_bytes,
        "disk_bytes": kept.disk_bytes,
        "host_bytes_a_gpu": kept.copy_bytes,
        **{f"{name}_s": value for name, value in asdict(kept.lost).items()},
        "best_interval_s": interval,
        "trains": shares(kept.lost, interval).trains,
    }
