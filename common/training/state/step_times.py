"""How long the parts of a step take on this rank.

On a GPU the host only queues work, so the ends of the parts are CUDA events, read once a later step's gradient norm has
made the host wait for them: nothing here synchronises. On a CPU they are the host's clock.
"""

import time
from typing import Any

import torch

FORWARD_BACKWARD, REDUCTION, OPTIMIZER, READING = "forward_backward", "gradient_reduction", "optimizer", "reading_data"
PARTS = {  # with their names in the log
    FORWARD_BACKWARD: "forward-backward", REDUCTION: "reduction", OPTIMIZER: "optimizer", READING: "data",
}  # fmt: skip


class HostClock:
    """Points in time of the host."""

    def now(self) -> Any:
        """The present."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """The time from `begin` to `end`."""
        return float(end - begin)

    def release(self, points: list[Any]) -> None:
        """Nothing: points are numbers."""


class DeviceClock:
    """Points in the device's current stream: CUDA events, used again once they are read."""

    def __init__(self) -> None:
        self._free: list[Any] = []

    def now(self) -> Any:
        """The point that the stream has reached when the work queued so far is done."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """The time between two points that the stream has passed."""
        return float(begin.elapsed_time(end)) / 1e3

    def release(self, points: list[Any]) -> None:
        """Takes back events that are not needed any more."""
        self._free += points


class StepTimes:
    """Sums of PARTS over the steps since the last `take`; READING is the host's, and lies within FORWARD_BACKWARD."""

    def __init__(self, device: str = "cpu") -> None:
        self._clock = DeviceClock() if device == "cuda" else HostClock()
        self._open: list[tuple[str, Any]] = []  # (part, its begin) of the step that is running
        self._ended: list[tuple[str, Any]] = []  # of the step before it, whose points are not read yet
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._steps = 0

    def begin(self, part: str) -> None:
        """Ends the part of the step that is running, and begins `part`."""
        self._open.append((part, self._clock.now()))

    def end(self) -> None:
        """Ends the step, after the host has waited for a point in it: the step before is read."""
        self.begin("")
        self._read()
        self._ended, self._open = self._open, []

    def add_reading(self, seconds: float) -> None:
        """Adds time in which the host waited for data; not counted outside of a step, as in evaluation."""
        if self._open:
            self._sums[READING] += seconds

    def take(self) -> dict[str, float]:
        """The mean seconds of each part of a step; begins anew. Only after the host has waited for the last step."""
        self._read()
        steps, sums = self._steps, self._sums
        self._steps, self._sums = 0, dict.fromkeys(PARTS, 0.0)
        return {part: seconds / steps for part, seconds in sums.items()} if steps else {}

    def _read(self) -> None:
        marks, self._ended = self._ended, []
        for (part, begin), (_, end) in zip(marks, marks[1:], strict=False):
            self._sums[part] += self._clock.seconds(begin, end)
        self._steps += bool(marks)
        self._clock.release([point for _, point in marks])
