"""What it costs the host to time the parts of a step, on the device here: `python -m tests.bench.bench_step_times`."""

import time

import torch

from common.training.state.step_times import FORWARD_BACKWARD, OPTIMIZER, REDUCTION, StepTimes

STEPS, MICRO_BATCHES, ROUNDS = 20_000, 4, 5


def main() -> None:
    """Prints the microseconds of a step, the least of ROUNDS."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    times, found = StepTimes(device), []
    for _ in range(ROUNDS):
        began, waited = time.perf_counter(), 0.0
        for _ in range(STEPS):
            times.begin(FORWARD_BACKWARD)
            for _ in range(MICRO_BATCHES):
                asked = time.perf_counter()
                times.add_reading(time.perf_counter() - asked)
            times.begin(REDUCTION)
            times.begin(OPTIMIZER)
            if device == "cuda":  # where training waits for the gradient norm
                before = time.perf_counter()
                torch.cuda.synchronize()
                waited += time.perf_counter() - before
            times.end()
        found.append((time.perf_counter() - began - waited) / STEPS)
    print(f"{device}: {1e6 * min(found):.2f} us a step of {MICRO_BATCHES} micro-batches")


if __name__ == "__main__":
    main()
