"""What is measured and printed: losses, rates, the time left."""

import time
from dataclasses import dataclass

from common.model.shape.config import QwenConfig
from common.platforms.base import Platform


def flops_per_token(qwen: QwenConfig, seq_length: int) -> float:
    """Floating-point operations that one token costs, forward and backward, without recomputation.

    Multiply-adds count two; backward costs twice forward; attention counts its causal half (s/2 keys a query), as in
    the PaLM paper's appendix B (arXiv 2204.02311) but for that half; the output layer counts its vocab_size rows.
    """
    h, d = qwen.hidden_size, qwen.head_dim
    projections = h * qwen.qkv_rows + qwen.num_attention_heads * d * h
    mlp = 3 * h * qwen.intermediate_size
    products = 3 * 2 * (qwen.num_hidden_layers * (projections + mlp) + h * qwen.vocab_size)
    return products + attention_flops_per_token(qwen, seq_length)


def attention_flops_per_token(qwen: QwenConfig, seq_length: int) -> float:
    """Those of them that queries, keys and values cost with each other."""
    scores = seq_length / 2 * 2 * qwen.num_attention_heads * qwen.head_dim
    return 3 * 2 * qwen.num_hidden_layers * scores


def peak_tflops(platform: Platform, device_name: str) -> float | None:
    """The device's dense bf16 peak in TFLOP/s by the vendor's data sheet; None when it is not known."""
    # The longest name first: "H20" is a part of "H200".
    names = sorted(platform.peak_tflops, key=len, reverse=True)
    return next((platform.peak_tflops[name] for name in names if name in device_name), None)


@dataclass
class Interval:
    """What happened since the last log line."""

    loss: float
    grad_norm: float
    learning_rate: float
    iterations: int
    seconds: float  # training alone: without evaluation and saving


@dataclass
class Meter:
    """Turns intervals into log lines."""

    train_iters: int
    global_batch_size: int
    seq_length: int
    world_size: int
    flops_per_token: float
    peak_tflops: float | None

    def rates(self, interval: Interval) -> dict[str, float]:
        """tokens/s over all GPUs, TFLOP/s a GPU and milliseconds an iteration."""
        seconds = interval.seconds / interval.iterations
        tokens = self.global_batch_size * self.seq_length / seconds
        tflops = tokens * self.flops_per_token / self.world_size / 1e12
        return {"tokens_per_s": tokens, "tflops_per_gpu": tflops, "ms_per_iteration": 1e3 * seconds}

    def line(self, iteration: int, consumed_samples: int, interval: Interval) -> str:
        """The log line of an interval that ends with `iteration`."""
        rates = self.rates(interval)
        flops = f"{rates['tflops_per_gpu']:#.3g} TFLOP/s/GPU"
        if self.peak_tflops:
            share = 100 * rates["tflops_per_gpu"] / self.peak_tflops
            flops += f" ({share:.1f}% of {self.peak_tflops:.0f} dense bf16)"
        left = (self.train_iters - iteration) * rates["ms_per_iteration"] / 1e3
        return " | ".join(
            (
                f"iteration {iteration}/{self.train_iters}",
                f"consumed samples {consumed_samples}",
                f"loss {interval.loss:.6f}",
                f"lr {interval.learning_rate:.3e}",
                f"grad norm {interval.grad_norm:.4f}",
                f"tokens/s {rates['tokens_per_s']:,.0f}",
                flops,
                f"{rates['ms_per_iteration']:.1f} ms/iteration",
                f"{clock(left)} left",
            )
        )


def clock(seconds: float) -> str:
    """`seconds` as 1:02:03, or 2 d 1:02:03."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


class Stopwatch:
    """Seconds of training since the last `lap`, without what ran while it was paused."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.paused_at: float | None = None

    def pause(self) -> None:
        """Stops the watch."""
        self.paused_at = time.perf_counter()

    def go_on(self) -> None:
        """Starts the watch again."""
        if self.paused_at is not None:
            self.start += time.perf_counter() - self.paused_at
            self.paused_at = None

    def lap(self) -> float:
        """The seconds since the last lap; begins the next."""
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds
