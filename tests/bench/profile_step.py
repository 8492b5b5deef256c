"""Where the time of a training step goes: `python -m tests.bench.profile_step FLAGS OF common.train` on one GPU.

Runs a few steps of the plan that the flags make, on real data, and prints the kernels by their total time, the share of
the time in which the GPU did nothing, and the rate. It writes no checkpoint.
"""

import os
import sys
import time

import torch

from common import log, mcore
from common.platforms import current
from common.settings import add_options, from_namespace
from common.training.config import TrainSettings

WARM_UP, TIMED, PROFILED = 5, 10, 3


def main() -> None:
    """Prints the table."""
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser, TrainSettings)
    settings = from_namespace(TrainSettings, parser.parse_args())
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(settings.master_port))
    log.setup()
    log.quiet_libraries()
    platform = current()
    mcore.prepare(platform)
    from common.training.distributed import process_group
    from common.training.loop import begin, open_batches
    from common.training.metrics import flops_per_token
    from common.training.optimizer import build_trainee
    from common.training.plan import plan_run
    from common.training.step import train_step

    plan = plan_run(settings, platform)
    assert plan.train is not None
    with process_group(platform, plan.sizes, settings.seed, settings.distributed_timeout_min):
        trainee = build_trainee(plan)
        begin(plan, trainee)
        data = open_batches(plan, plan.train, 0)
        for _ in range(WARM_UP):
            train_step(plan, trainee, data)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(TIMED):
            train_step(plan, trainee, data)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / TIMED
        tokens = settings.global_batch_size * settings.seq_length
        tflops = tokens / seconds * flops_per_token(plan.qwen, settings.seq_length) / 1e12
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{1e3 * seconds:.1f} ms a step, {tokens / seconds:,.0f} tokens/s, {tflops:.0f} TFLOP/s, {peak:.1f} GiB")
        with torch.profiler.profile() as profile:
            for _ in range(PROFILED):
                train_step(plan, trainee, data)
            torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time_total for event in events) / 1e3 / PROFILED
    print(f"kernels {busy:.1f} ms a step, of {1e3 * seconds:.1f} ms without the profiler")
    totals: dict[str, list[float]] = {}
    for event in events:
        entry = totals.setdefault(event.name[:110], [0.0, 0])
        entry[0] += event.device_time_total / 1e3 / PROFILED
        entry[1] += 1 / PROFILED
    for name, (total, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:45]:
        print(f"{total:9.3f} ms {100 * total / busy:5.1f}% {count:7.0f}x  {name}")


if __name__ == "__main__":
    sys.exit(main())
