"""One layout run for a few steps by `common.train` itself, and ended before it saves anything."""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from common.settings import to_flags
from common.start import from_kit
from common.training.launching.parent_death import set_parent_death_signal
from common.training.settings import TrainSettings
from common.training.tracking.records import METRICS_FILE, read_metrics

NEVER = 10**7  # steps
POLL_S = 0.2


@dataclass(frozen=True)
class Trial:
    """What a layout reached: tokens/s over all GPUs and GiB of the fullest GPU; or why it did not."""

    tokens_per_s: float = 0.0
    memory_gib: float = 0.0  # torch.cuda.max_memory_allocated; 0 on a CPU
    reason: str = ""


def trial_settings(settings: TrainSettings, model_folder: Path, folder: Path) -> TrainSettings:
    """`settings` for a trial in `folder`: no save, evaluation or tracking; random weights, but adapters need theirs."""
    if not settings.lora:
        settings = replace(settings, load_checkpoint_path=None, hf_model_path=str(model_folder))
    return replace(
        settings, save_checkpoint_path=str(folder), is_initial_run="auto", train_iters=NEVER, epochs=None,
        exit_interval=None, exit_duration_min=None, save_interval=NEVER, keep_epochs=False, keep_best=0,
        export_hf="none", async_save=False, eval_interval=0, log_interval=1, max_first_loss=None, tensorboard="false",
        wandb_project=None, swanlab_project=None, max_restarts=0, master_port=None, rdzv_endpoint=None,
        profile=None, memory_snapshot=False,
    )  # fmt: skip


def run_trial(settings: TrainSettings, model_folder: Path, iterations: int, limit_s: float) -> Trial:
    """Trains for `iterations` steps, at most `limit_s` seconds; the median of the second half of them counts."""
    with TemporaryDirectory(prefix="tune-") as scratch:
        folder, log = Path(scratch) / "run", Path(scratch) / "log.txt"
        with from_kit(), log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "common.train", *to_flags(trial_settings(settings, model_folder, folder))],
                env={**os.environ, "TMPDIR": scratch}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=set_parent_death_signal,  # Ctrl-C is for this process alone
            )  # fmt: skip
        try:
            return follow(process, folder, log, iterations, limit_s)
        finally:
            end(process)


def follow(process: "subprocess.Popen[bytes]", folder: Path, log: Path, iterations: int, limit_s: float) -> Trial:
    """The trial of a run that is under way, once its metrics hold `iterations` steps, it ends, or time is over."""
    began = time.monotonic()
    while True:
        ended = process.poll() is not None
        steps = steps_of(folder)
        if len(steps) >= iterations:
            counted = steps[iterations // 2 : iterations]
            return Trial(
                statistics.median(step["tokens_per_s"] for step in counted),
                max(step.get("memory_gib", 0.0) for step in steps),
            )
        if ended:
            return Trial(reason=reason_of(log))
        if time.monotonic() - began > limit_s:
            return Trial(reason=f"{len(steps)} of {iterations} steps in {limit_s:.0f} s")
        time.sleep(POLL_S)


def steps_of(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step so far."""
    if not (folder / METRICS_FILE).exists():
        return []
    return [line for line in read_metrics(folder) if "tokens_per_s" in line]


def reason_of(log: Path) -> str:
    """Why a run failed: the last error that it printed, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line or "out of memory" in line]
    return (errors or lines or ["it printed nothing"])[-1].strip()


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kills the run and waits until its ranks and their workers are gone, and their GPUs free."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=60)
