"""Goodput: the fraction of a run's time spent training, given saves and faults, and how often to save.

Letters: M mean seconds between faults (MTBF), t seconds of training between two saves, d seconds that a save pauses
training, R seconds from a fault until training resumes. Faults are independent and may occur at any time, during saves
and restarts too. The expected time from one checkpoint to the next is then M e^(R/M) (e^((t+d)/M) - 1) (J. T. Daly, A
higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems 22, 2006,
the complete model). For short t and d the optimum is t = sqrt(2 d M) (J. W. Young, A first order approximation to the
optimum checkpoint interval, Communications of the ACM 17, 1974).
"""

import math
from dataclasses import dataclass

# The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs.
LLAMA_3_GPU_MTBF_HOURS = 54 * 24 * 16384 / 419
LARGEST = 700.0  # exponent of e that a float can hold; at times that far above M the goodput is 0


@dataclass(frozen=True)
class Interruptions:
    """The times of saves and faults, in seconds."""

    between_faults: float  # M: the mean over all GPUs of the run
    stall: float  # d
    write: float  # from the start of a save until a run can resume from it; the stall if the save is synchronous
    recovery: float  # R: detecting the fault, restarting the processes and reading the checkpoint

    @property
    def behind(self) -> float:
        """Seconds of training since the state that a checkpoint holds when it is complete; saves do not overlap."""
        return self.write - self.stall


@dataclass(frozen=True)
class Shares:
    """Shares of a run's time; they add up to 1."""

    trains: float
    saves: float
    recovers: float
    repeats: float  # training and unfinished saves since the checkpoint that the run resumes from


def seconds_between_faults(gpus: int, gpu_mtbf_hours: float) -> float:
    """M of a run on `gpus` GPUs, each with a fault every `gpu_mtbf_hours` on average; any fault ends the run."""
    return gpu_mtbf_hours * 3600 / gpus


def shares(lost: Interruptions, interval: float) -> Shares:
    """The shares of the expected time with `interval` seconds of training between saves.

    With an asynchronous save, a fault also loses the training since the save began (`behind`), counted as part of R.
    """
    mean = lost.between_faults
    stall = max(lost.stall, lost.write - interval)
    faults = math.expm1(min((interval + stall) / mean, LARGEST))  # until the next checkpoint, each with a recovery
    total = mean * math.exp(min((lost.recovery + lost.behind) / mean, LARGEST)) * faults
    trains, saves, recovers = interval / total, stall / total, -math.expm1(-lost.recovery / mean)
    return Shares(trains, saves, recovers, max(0.0, 1 - trains - saves - recovers))


def best_interval(lost: Interruptions) -> float:
    """Seconds of training between saves with the highest goodput; 0: save after each step.

    The derivative of Daly's complete model is 0 where x + e^-x - 1 = d / M with x = (t + d) / M. Newton's method
    converges to it from above, starting at x = 1 + d / M. It does not depend on R.
    """
    ratio = lost.stall / lost.between_faults
    if not ratio:
        return lost.behind
    x, last = 1 + ratio, math.inf
    while x < last * (1 - 1e-12):
        last, x = x, x + (x + math.expm1(-x) - ratio) / math.expm1(-x)
    return max(x * lost.between_faults - lost.stall, lost.behind)


def best_steps(lost: Interruptions, step_seconds: float) -> int:
    """The SAVE_INTERVAL with the highest goodput: the better of the two step counts around `best_interval`."""
    below = max(1, math.floor(best_interval(lost) / step_seconds))
    return max(below, below + 1, key=lambda steps: shares(lost, steps * step_seconds).trains)
