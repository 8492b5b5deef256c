"""The parts of steps are added up, and a device's clock is read only where the host has waited for it."""

from typing import Any

import pytest

from common.training.state import step_times
from common.training.state.step_times import FORWARD_BACKWARD, OPTIMIZER, READING, REDUCTION, StepTimes


class Event:
    """Stands in for a CUDA event: the stream passes it when the host next waits."""

    time = 0.0
    made = 0
    waiting: list["Event"] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.at, self.passed = Event.time, False
        Event.waiting.append(self)

    def elapsed_time(self, end: "Event") -> float:
        assert self.passed and end.passed, "read before the host has waited"
        return 1e3 * (end.at - self.at)


def wait() -> None:
    while Event.waiting:
        Event.waiting.pop().passed = True


@pytest.fixture(params=["cpu", "cuda"])
def times(request: Any, monkeypatch: pytest.MonkeyPatch) -> StepTimes:
    Event.time, Event.made, Event.waiting = 0.0, 0, []
    monkeypatch.setattr(step_times.torch.cuda, "Event", Event)
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: Event.time)
    return StepTimes(request.param)


def step(times: StepTimes, *seconds: float) -> None:
    """A step whose parts take `seconds`; the host waits within the last one, as for the gradient norm."""
    for part, duration in zip((FORWARD_BACKWARD, REDUCTION, OPTIMIZER), seconds, strict=True):
        times.begin(part)
        if part == FORWARD_BACKWARD:
            times.add_reading(0.5)
        if part == OPTIMIZER:
            wait()
        Event.time += duration
    times.end()
    Event.time += 100  # between steps


def test_the_means_are_those_of_the_steps_since_the_last(times: StepTimes) -> None:
    assert times.take() == {}
    times.add_reading(7)  # evaluation
    step(times, 3, 2, 1)
    step(times, 5, 4, 2)
    wait()
    assert times.take() == {FORWARD_BACKWARD: 4, REDUCTION: 3, OPTIMIZER: 1.5, READING: 0.5}
    step(times, 8, 0, 0)
    wait()
    assert times.take() == {FORWARD_BACKWARD: 8, REDUCTION: 0, OPTIMIZER: 0, READING: 0.5}
    assert times.take() == {}


def test_a_long_interval_needs_the_events_of_two_steps(times: StepTimes) -> None:
    for _ in range(50):
        step(times, 1, 1, 1)
    assert Event.made in (0, 8)
