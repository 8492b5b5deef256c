"""The log of a run: loss, gradient norm, learning rate and throughput every LOG_INTERVAL steps, memory once."""

import torch
import torch.distributed as dist

from common.log import BOLD, logger
from common.training.loop.bad_steps import BadSteps
from common.training.loop.forward_step import mean_loss, sum_reporting_losses
from common.training.loop.memory import memory_line
from common.training.loop.metrics import Interval, Meter, Stopwatch, flops_per_token, peak_tflops
from common.training.loop.train_step import StepResult
from common.training.planning.plan import Plan, Progress
from common.training.state.step_times import PARTS, StepTimes
from common.training.tracking.tracker import Tracker

HEADER_ROWS = 20  # between repetitions of the table's heading


class TrainingLog:
    """Sums up steps, and logs them to the console and to the tracker."""

    def __init__(self, plan: Plan, tracker: Tracker, times: StepTimes) -> None:
        self.plan, self.meter, self.tracker, self.times = plan, build_meter(plan), tracker, times
        self.stopwatch = Stopwatch()
        self.logged_pauses: dict[str, float] = {}
        self.reporting_loss = sum_reporting_losses(plan, [])
        self.interval_steps = self.total_steps = 0  # since the last line, and before it
        self.counted_steps = 0  # of the interval, without skipped ones
        self.memory_is_logged = False
        self.rows = 0

    def add(self, result: StepResult) -> None:
        """Adds a step to the interval."""
        self.interval_steps += 1
        if not result.skipped:
            self.reporting_loss += result.reporting_loss
            self.counted_steps += 1

    def is_due(self, iteration: int) -> bool:
        """Whether an interval ends with the step `iteration`."""
        return iteration % self.plan.settings.log_interval == 0 or iteration in (1, self.plan.train_iters)

    def log(self, progress: Progress, grad_norm: float, learning_rate: float, bad_steps: BadSteps) -> float:
        """Logs the interval that ends at `progress`, and begins the next; returns its mean loss. A collective call."""
        assert self.plan.train
        means = mean_loss(self.reporting_loss)
        loss = means.loss
        steps = self.total_steps + self.interval_steps
        pauses = dict(self.stopwatch.pauses)
        interval = Interval(
            loss, grad_norm, learning_rate, self.interval_steps, self.stopwatch.lap(), means.num_tokens,
            sum(pauses.values()) / steps, self._padding_share(means.num_padding), means.of_pairs,
        )  # fmt: skip
        if self.rows % HEADER_ROWS == 0:
            logger.info("%s", self.meter.header, extra={"style": BOLD})
        self.rows += 1
        logger.info("%s", self.meter.row(progress.iteration, interval))
        parts = self.times.take()  # mean_loss has waited for the last step
        if self.rows % HEADER_ROWS == 2:  # the first row of a run is that of a slow step
            logger.info("%s", describe_parts(parts))
        self.tracker.log(
            progress.iteration,
            **{"loss": loss, **means.of_pairs, "grad_norm": grad_norm, "learning_rate": learning_rate},
            **self.meter.rates(interval),
            **{f"{part}_ms": 1e3 * seconds for part, seconds in parts.items()},
            **{f"{name}_s": seconds - self.logged_pauses.get(name, 0.0) for name, seconds in pauses.items()},
            **self._memory(),
            **({} if interval.padding is None else {"padding": interval.padding}),
            consumed_samples=progress.consumed_samples,
            epoch=progress.consumed_samples / self.plan.train.samples_per_epoch,
            skipped_steps=bad_steps.total,
        )
        self.logged_pauses = pauses
        self.total_steps += self.interval_steps
        self.reporting_loss.zero_()
        self.interval_steps = self.counted_steps = 0
        if self.total_steps > 1 and not self.memory_is_logged and self.plan.platform.device == "cuda":
            logger.info(memory_line())
            self.memory_is_logged = True
        return loss

    def _padding_share(self, num_padding: float) -> float | None:
        """The share of the interval's positions that are padding; None for pretraining, whose rows have none."""
        settings = self.plan.settings
        if settings.train_mode == "pretrain":
            return None
        rows = self.counted_steps * settings.global_batch_size * settings.rows_per_sample
        positions = rows * settings.seq_length
        return num_padding / positions if positions else float("nan")

    def _memory(self) -> dict[str, float]:
        """The peak device memory of the fullest rank, which the others only see together. A collective call."""
        if self.plan.platform.device != "cuda":
            return {}
        peak = torch.tensor(torch.cuda.max_memory_allocated(), dtype=torch.float64, device="cuda")
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return {"memory_gib": float(peak) / 2**30}


def describe_parts(parts: dict[str, float]) -> str:
    """The mean times of a step's parts, as a line of the log."""
    shown = {PARTS[part]: 1e3 * seconds for part, seconds in parts.items()}
    figures = ", ".join(f"{name} {ms:.{0 if ms >= 100 else 1}f}" for name, ms in shown.items())
    return f"ms a step, rank 0: {figures}"


def build_meter(plan: Plan) -> Meter:
    """The meter of this rank's device; logs the device's peak, if it is known."""
    device_name = torch.cuda.get_device_name() if plan.platform.device == "cuda" else plan.platform.name
    if peak := peak_tflops(plan.platform, device_name):
        logger.info("TFLOP/s below are of one GPU; the peak of %s is %.0f (dense bf16)", device_name, peak)
    return Meter(
        train_iters=plan.train_iters,
        global_batch_size=plan.settings.global_batch_size * plan.settings.rows_per_sample,
        seq_length=plan.settings.seq_length,
        world_size=plan.sizes.world_size,
        flops_per_token=flops_per_token(
            plan.qwen, plan.settings.seq_length, plan.adapters.lora if plan.adapters else None
        ),
        shows_padding=plan.settings.train_mode != "pretrain",
        shows_pairs=plan.settings.train_mode == "dpo",
    )
