"""Where the time of a training step goes: `python -m tests.bench.profile_step FLAGS OF common.train` on one GPU.

Runs a few steps of the plan that the flags make, on real data, and prints the rate, what the kernels' time is spent on,
the kernels by their total time, and the fraction of the time in which the GPU was idle. It writes no checkpoint.
"""

import os
import re
import sys
import time
from typing import Any

import torch

from common import log
from common.engine.installation import prepare
from common.platforms import current
from common.settings import add_options, from_namespace
from common.training.settings import TrainSettings

WARM_UP, TIMED, PROFILED = 3, 4, 1
MS = 1e3  # the profiler counts microseconds
CHIP_TFLOPS = 790  # what matrix products were seen to reach on an H200: docs/benchmarks.md
# What a kernel is for, by its name; the first that fits.
PURPOSES = {
    "loss without its products": r"_loss_|_lce_glue",
    "matrix products": r"nvjet|cublasLt|quack.*gemm|GemmMod",
    "SwiGLU, split and rotated QKV": r"swiglu|silu|rope",
    "optimizer": r"multi_tensor|adam",
    "norms and residual sums": r"_norm_|rmsnorm|triton_poi_fused_add|CUDAFunctor_add<c10::BFloat16>",
    "attention": r"flash|sdpa|fmha|dot_do_o|dq_to_16bits",
    "other products": r"gemm",
    "other": r"",
}


def main() -> None:
    """Prints the table."""
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser, TrainSettings)
    settings = from_namespace(TrainSettings, parser.parse_args())
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(settings.meeting_place[1]))
    log.setup()
    log.quiet_libraries()
    platform = current()
    prepare(platform)
    from common.training.checkpointing.load import load_checkpoint
    from common.training.launching.process_group import process_group
    from common.training.loop.data_loading import RankData
    from common.training.loop.metrics import attention_flops_per_token, flops_per_token
    from common.training.loop.train_step import train_step
    from common.training.planning.plan import plan_run
    from common.training.state.training_state import build_training_state

    plan = plan_run(settings, platform)
    assert plan.train is not None
    with process_group(platform, plan.sizes, settings.seed, settings.distributed_timeout_min):
        training_state = build_training_state(plan)
        load_checkpoint(plan, training_state)
        data = RankData(plan, plan.train).read_from(0, training_state)
        for _ in range(WARM_UP):
            train_step(plan, training_state, data, 0, False)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(TIMED):
            train_step(plan, training_state, data, 0, False)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / TIMED
        tokens = settings.global_batch_size * settings.seq_length
        tflops = tokens / seconds * flops_per_token(plan.qwen, settings.seq_length) / 1e12
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{1e3 * seconds:.1f} ms a step, {tokens / seconds:,.0f} tokens/s, {tflops:.0f} TFLOP/s, {peak:.1f} GiB")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED):
                train_step(plan, training_state, data, 0, False)
            torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    attention = attention_flops_per_token(plan.qwen, settings.seq_length)
    total = flops_per_token(plan.qwen, settings.seq_length)
    print_purposes(events, {"attention": tokens * attention, "matrix products": tokens * (total - attention)})
    print_kernels(events)
    print_gaps(events)


def print_purposes(events: list[Any], operations: dict[str, float]) -> None:
    """Prints the time of kernels per step by purpose; with `operations` their rate, and the time at the GPU's peak."""
    totals = dict.fromkeys(PURPOSES, 0.0)
    for event in events:
        purpose = next(name for name, pattern in PURPOSES.items() if re.search(pattern, event.name))
        totals[purpose] += event.device_time_total / MS / PROFILED
    for name, total in sorted(totals.items(), key=lambda item: -item[1]):
        rate = ""
        if name in operations and total:
            ideal = operations[name] / CHIP_TFLOPS / 1e9
            rate = f", {operations[name] / total / 1e9:.0f} TFLOP/s, {ideal:.0f} ms at {CHIP_TFLOPS}"
        print(f"{total:9.1f} ms  {name}{rate}")


def print_kernels(events: list[Any]) -> None:
    """Prints the kernels by their total time a step."""
    busy = sum(event.device_time_total for event in events) / MS / PROFILED
    print(f"kernels {busy:.1f} ms a step")
    totals: dict[str, list[float]] = {}
    for event in events:
        entry = totals.setdefault(event.name[:110], [0.0, 0])
        entry[0] += event.device_time_total / MS / PROFILED
        entry[1] += 1 / PROFILED
    for name, (total, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:45]:
        print(f"{total:9.3f} ms {100 * total / busy:5.1f}% {count:7.0f}x  {name}")


def print_gaps(events: list[Any]) -> None:
    """Prints the time in which no kernel ran, and between which kernels it was lost."""
    lost: dict[str, list[float]] = {}
    ordered = sorted(events, key=lambda event: event.time_range.start)
    end, before = ordered[0].time_range.start, ""
    for event in ordered:
        if event.time_range.start > end:
            entry = lost.setdefault(f"{before[:60]} -> {event.name[:60]}", [0.0, 0])
            entry[0] += (event.time_range.start - end) / MS / PROFILED
            entry[1] += 1 / PROFILED
        if event.time_range.end > end:
            end, before = event.time_range.end, event.name
    span = (end - ordered[0].time_range.start) / MS / PROFILED
    print(f"no kernel {sum(total for total, _ in lost.values()):.1f} ms of {span:.1f} ms a step")
    for name, (total, count) in sorted(lost.items(), key=lambda item: -item[1][0])[:12]:
        print(f"{total:9.3f} ms {count:7.0f}x  {name}")


if __name__ == "__main__":
    sys.exit(main())
