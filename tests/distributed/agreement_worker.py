"""Runs in each rank: what the ranks agree on with the gradient norm, for each rank that stops and whose loss is bad."""

import itertools
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from common.engine.installation import prepare
from common.platforms.cpu import CPU

EMPTY = 1  # the rank without a gradient, as where a shard has none


def main() -> None:
    prepare(CPU)
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    from common.training.loop.train_step import agree

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    grads = [torch.randn(size, generator=generator) for size in (5, 1000)] if rank != EMPTY else []
    optimizer: Any = SimpleNamespace(
        get_grads_for_grad_norm=lambda: grads, get_main_grads_for_grad_norm=lambda: grads,
        get_grad_stats_parallel_group=lambda: None,
    )  # fmt: skip
    training_state: Any = SimpleNamespace(optimizer=optimizer)
    norm = float(get_grad_norm_fp32(grads))
    for stops, bad, value in itertools.product((None, 0, 2), (None, 1), ("nan", "inf")):
        loss = torch.tensor([float(value) if rank == bad else 1.5, 3.0, 0.0], dtype=torch.float64)
        found = agree(training_state, loss, rank == stops)
        assert found == (norm, stops is not None, bad is None), (found, norm, stops, bad)
    if grads:
        grads[0][0] = float("nan")
    norm, stop, is_finite = agree(training_state, torch.ones(3, dtype=torch.float64), rank == 2)
    assert norm != norm and stop and is_finite


if __name__ == "__main__":
    main()
