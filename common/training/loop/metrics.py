"""Throughput: FLOPs per token, tokens/s, TFLOP/s per GPU and the time left."""

import time
from dataclasses import dataclass, field

from common.model.shape.config import QwenConfig
from common.model.shape.lora import LoraConfig, adapter_parameters
from common.platforms.base import Platform


def flops_per_token(qwen: QwenConfig, seq_length: int, lora: LoraConfig | None = None) -> float:
    """Floating-point operations of one token, forward and backward, without recomputation.

    A multiply-add counts as two; backward costs twice as much as forward. As in appendix B of the PaLM paper (arXiv
    2204.02311), except that attention counts its causal half only (s/2 keys a query). The output layer has vocab_size
    rows. With LoRA the frozen weights have no gradient, so their backward pass costs as much as the forward pass.
    """
    h, d = qwen.hidden_size, qwen.head_dim
    projections = h * qwen.qkv_rows + qwen.num_attention_heads * d * h
    mlp = 3 * h * qwen.intermediate_size
    weights = qwen.num_hidden_layers * (projections + mlp) + h * qwen.vocab_size
    if lora is None:
        products = 3 * 2 * weights
    else:
        products = 2 * 2 * weights + 3 * 2 * qwen.num_hidden_layers * adapter_parameters(lora, qwen)
    return products + attention_flops_per_token(qwen, seq_length)


def attention_flops_per_token(qwen: QwenConfig, seq_length: int) -> float:
    """The part of `flops_per_token` that the products of queries, keys and values take."""
    scores = seq_length / 2 * 2 * qwen.num_attention_heads * qwen.head_dim
    return 3 * 2 * qwen.num_hidden_layers * scores


def peak_tflops(platform: Platform, device_name: str) -> float | None:
    """The device's dense bf16 peak in TFLOP/s, from the vendor's data sheet; None if unknown."""
    # The longest name first: "H20" is a prefix of "H200".
    names = sorted(platform.peak_tflops, key=len, reverse=True)
    return next((platform.peak_tflops[name] for name in names if name in device_name), None)


@dataclass
class Interval:
    """The steps since the last log line."""

    loss: float
    grad_norm: float
    learning_rate: float
    iterations: int
    seconds: float  # of training, without evaluation and saving
    supervised_tokens: float = 0.0  # in the loss
    other_seconds_per_iteration: float = 0.0  # evaluation and saving, averaged since the run started
    padding: float | None = None  # share of the positions; None for pretraining
    of_pairs: dict[str, float] = field(default_factory=dict)  # their metrics by name; of preferences only


@dataclass
class Meter:
    """Computes the throughput of intervals and formats their log lines, the rows of a table in the log."""

    train_iters: int
    global_batch_size: int
    seq_length: int
    world_size: int
    flops_per_token: float
    shows_padding: bool = False
    shows_pairs: bool = False

    def rates(self, interval: Interval) -> dict[str, float]:
        """Tokens/s and supervised tokens/s over all GPUs, TFLOP/s per GPU and milliseconds per iteration."""
        seconds = interval.seconds / interval.iterations
        tokens = self.global_batch_size * self.seq_length / seconds
        return {
            "tokens_per_s": tokens,
            "supervised_tokens_per_s": interval.supervised_tokens / interval.seconds,
            "tflops_per_gpu": tokens * self.flops_per_token / self.world_size / 1e12,
            "ms_per_iteration": 1e3 * seconds,
        }

    @property
    def header(self) -> str:
        """The heading of `row`'s columns."""
        return " " * self._first_width + "".join(f"  {name:>{width}}" for name, width in self._columns.items())

    def row(self, iteration: int, interval: Interval) -> str:
        """The log line of an interval that ends at `iteration`: its values under `header`."""
        rates = self.rates(interval)
        seconds = rates["ms_per_iteration"] / 1e3 + interval.other_seconds_per_iteration
        values = {
            "loss": f"{interval.loss:.6f}",
            "grad norm": f"{interval.grad_norm:.4f}",
            **{column: f"{interval.of_pairs[name]:.2f}" for column, (name, _) in self._pair_columns.items()},
            "lr": f"{interval.learning_rate:.2e}",
            "tokens/s": f"{rates['tokens_per_s']:,.0f}",
            "TFLOP/s": short(rates["tflops_per_gpu"]),
            "pad": "" if interval.padding is None else f"{interval.padding:.1%}",
            "left": clock((self.train_iters - iteration) * seconds),
        }
        cells = (f"  {values[name]:>{width}}" for name, width in self._columns.items())
        return f"{f'iteration {iteration}/{self.train_iters}':<{self._first_width}}" + "".join(cells)

    @property
    def _first_width(self) -> int:
        return len("iteration /") + 2 * len(str(self.train_iters))

    @property
    def _columns(self) -> dict[str, int]:
        """The width of each column after the first, for values of usual size."""
        padding = {"pad": 5} if self.shows_padding else {}
        pairs = {column: width for column, (_, width) in self._pair_columns.items()}
        return {"loss": 8, "grad norm": 9, **pairs, "lr": 8, "tokens/s": 8, "TFLOP/s": 7, **padding, "left": 7}

    @property
    def _pair_columns(self) -> dict[str, tuple[str, int]]:
        """(metric, width) of each column on preferences; + is of the chosen answers, - of the rejected."""
        columns = {
            "accuracy": ("accuracy", 8), "margin": ("reward_margin", 6),
            "reward +": ("reward_chosen", 8), "reward -": ("reward_rejected", 8),
            "log p +": ("log_prob_chosen", 8), "log p -": ("log_prob_rejected", 8),
        }  # fmt: skip
        return columns if self.shows_pairs else {}


def short(rate: float) -> str:
    """`rate` in three digits or more, two below 0.001, in at most seven characters: "590", "0.00177", "2.1e-04"."""
    text = f"{rate:,.0f}" if rate >= 999.5 else f"{rate:#.3g}".removesuffix(".")
    return text if len(text) <= 7 else f"{rate:.1e}"


def clock(seconds: float) -> str:
    """`seconds` as 1:02:03, or 2 d 1:02:03."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


class Stopwatch:
    """Measures seconds of training since the last `lap`, without the time in which it was paused."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.paused_at: float | None = None
        self.paused_for = ""
        self.pauses: dict[str, float] = {}  # seconds by what they were for

    def pause(self, activity: str) -> None:
        """Pauses the watch for `activity`."""
        self.paused_at, self.paused_for = time.perf_counter(), activity

    def resume(self) -> None:
        """Resumes the watch, if it is paused."""
        if self.paused_at is not None:
            seconds = time.perf_counter() - self.paused_at
            self.start += seconds
            self.pauses[self.paused_for] = self.pauses.get(self.paused_for, 0.0) + seconds
            self.paused_at = None

    def lap(self) -> float:
        """The seconds since the last lap; starts the next lap."""
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds
