"""Causal attention by each kernel that works here, forward and backward, for the heads of Qwen2.5's sizes on one GPU:

    python -m tests.bench.bench_attention [0.5B ...]

Prints milliseconds of both passes, mean of a loop of some seconds (the board's power is used up by then), with TFLOP/s:
two multiply-adds for each of the causal half's scores, the backward pass two and a half times the forward's.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from common.model.layers.attention import KINDS, unusable_reason

# size: tokens, micro-batch, query heads, key-value groups, head size
SHAPES = {
    "0.5B": (4096, 16, 14, 2, 64),
    "1.5B": (4096, 8, 12, 2, 128),
    "3B": (4096, 4, 16, 2, 128),
    "7B": (4096, 1, 28, 4, 128),
}
SECONDS, AHEAD = 3.0, 8
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def kernels(heads: tuple[int, int, int], device: torch.device) -> Iterator[tuple[str, Attention]]:
    """The kit's kinds and Transformer Engine's own, those that work and are right."""
    for name, kind in KINDS.items():
        failure = unusable_reason(kind, heads, device)
        if failure:
            print(f"{name}: {failure}", flush=True)
            continue
        module = kind(SimpleNamespace(softmax_scale=None, context_parallel_size=1), 1, None, "self")
        yield name, lambda q, k, v, module=module: module(q, k, v, None)
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as error:
        print(f"transformer_engine: {error}", flush=True)
        return
    num_heads, groups, size = heads
    yield (
        "transformer_engine",
        DotProductAttention(
            num_heads, size, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal"
        ),
    )


def milliseconds(attention: Attention, tensors: list[torch.Tensor], above: torch.Tensor) -> float:
    """Of one forward and backward pass, once the first third of the time is over."""

    def steps() -> None:
        for _ in range(AHEAD):
            torch.autograd.grad(attention(*tensors), tensors, above)
        torch.cuda.synchronize()

    steps()
    begin, passes, start = time.perf_counter(), 0, 0.0
    while time.perf_counter() - begin < SECONDS:
        if time.perf_counter() - begin > SECONDS / 3:
            start = start or time.perf_counter()
            passes += AHEAD
        steps()
    return 1e3 * (time.perf_counter() - start) / passes


def main() -> None:
    """Prints a line a kernel and shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sizes", nargs="*", choices=[[], *SHAPES])
    device: Any = torch.device("cuda")
    for size in parser.parse_args().sizes or SHAPES:
        s, b, num_heads, groups, d = SHAPES[size]
        tensors = [
            torch.randn(s, b, heads, d, device=device, dtype=torch.bfloat16, requires_grad=True)
            for heads in (num_heads, groups, groups)
        ]
        above = torch.randn(s, b, num_heads * d, device=device, dtype=torch.bfloat16)
        for name, attention in kernels((num_heads, groups, d), device):
            each = milliseconds(attention, tensors, above)
            tflops = 3.5 * 4 * b * num_heads * d * s * s / 2 / each / 1e9
            print(f"{size} {name}: {each:.3f} ms, {tflops:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
