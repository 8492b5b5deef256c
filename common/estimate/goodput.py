"""Goodput: the share of a run's time spent training, given saves and faults, and how often to save.

Letters: M mean seconds between faults, t seconds of training between two saves, d seconds that training stands still
for a save, R seconds from a fault until training goes on. Faults come independently of each other and at any moment,
during saves and restarts too. Then the expected time from one checkpoint to the next is M e^(R/M) (e^((t+d)/M) - 1)
(J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
Systems 22, 2006, its complete model); for short t and d its least is at t = sqrt(2 d M) (J. W. Young, A first order
approximation to the optimum checkpoint interval, Communications of the ACM 17, 1974).
"""

import math
from dataclasses import dataclass

# The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs.
LLAMA_3_GPU_MTBF_HOURS = 54 * 24 * 16384 / 419
LARGEST = 700.0  # of what e can be raised to; of a time so far above M nothing trains


@dataclass(frozen=True)
class Interruptions:
    """What keeps a run from training, in seconds."""

    between_faults: float  # M: the mean, over all its GPUs
    stall: float  # d
    write: (
        float  # from the beginning of a save until it can be resumed from; the stall, where nothing goes on meanwhile
    )
    recovery: float  # R: until a fault is seen, processes are there again and the checkpoint is read

    @property
    def behind(self) -> float:
        """Seconds of training that a checkpoint is behind when it is whole; a save waits for the one before it."""
        return self.write - self.stall


@dataclass(frozen=True)
class Shares:
    """Where the time goes, together 1."""

    trains: float
    saves: float
    recovers: float
    repeats: float  # what was trained, or half saved, since the checkpoint that a fault leaves


def seconds_between_faults(gpus: int, gpu_mtbf_hours: float) -> float:
    """M of a run that any fault of one of its `gpus` ends, each of which has one in `gpu_mtbf_hours` on average."""
    return gpu_mtbf_hours * 3600 / gpus


def shares(lost: Interruptions, interval: float) -> Shares:
    """The shares of the expected time with `interval` seconds of training between saves.

    A checkpoint that is written while training goes on lets each fault undo so much more (`behind`), which is counted
    as part of R.
    """
    mean = lost.between_faults
    stall = max(lost.stall, lost.write - interval)
    faults = math.expm1(min((interval + stall) / mean, LARGEST))  # with a recovery each, until the next checkpoint
    whole = mean * math.exp(min((lost.recovery + lost.behind) / mean, LARGEST)) * faults
    trains, saves, recovers = interval / whole, stall / whole, -math.expm1(-lost.recovery / mean)
    return Shares(trains, saves, recovers, max(0.0, 1 - trains - saves - recovers))


def best_interval(lost: Interruptions) -> float:
    """Seconds of training between saves with which the largest share of the time trains; 0: save after each step.

    The derivative of Daly's complete model is 0 where x + e^-x - 1 = d / M with x = (t + d) / M. From x = 1 + d / M,
    which is too large, Newton's method falls to it. R does not move it.
    """
    ratio = lost.stall / lost.between_faults
    if not ratio:
        return lost.behind
    x, last = 1 + ratio, math.inf
    while x < last * (1 - 1e-12):
        last, x = x, x + (x + math.expm1(-x) - ratio) / math.expm1(-x)
    return max(x * lost.between_faults - lost.stall, lost.behind)


def best_steps(lost: Interruptions, step_seconds: float) -> int:
    """The SAVE_INTERVAL with which the largest share of the time trains: the better of the two around the best time."""
    below = max(1, math.floor(best_interval(lost) / step_seconds))
    return max(below, below + 1, key=lambda steps: shares(lost, steps * step_seconds).trains)
