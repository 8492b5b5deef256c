"""EXIT_DURATION_MIN ends a run while there is still time for a step and for the save."""

from types import SimpleNamespace

import pytest

from common.training.planning import deadline
from common.training.planning.deadline import STARTED, Deadline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that does not advance; the command began at 1000."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(deadline, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setenv(STARTED, "1000")
    return clock


def test_the_minutes_count_from_the_start_of_the_command(clock: SimpleNamespace) -> None:
    clock.now = 1050.0  # the ranks took 50 s to start
    end = Deadline(1)
    assert not end.is_near(0)
    clock.now = 1059.0
    assert end.is_near(0)  # the step before took 9 s, and the next would end at 1068


def test_time_is_left_for_the_longest_step_so_far_and_a_save_slower_than_the_last(
    clock: SimpleNamespace,
) -> None:
    end = Deadline(10)  # at 1600
    answers = []
    for clock.now in (1000, 1100, 1110, 1439, 1441):  # the longest is 329 s
        answers.append(end.is_near(0))
    assert answers == [False, False, False, True, True]
    end = Deadline(10)
    clock.now = 1479.0
    assert not end.is_near(100)
    clock.now = 1479.6
    assert end.is_near(100)  # 1479.6 + 0.6 + 1.2 x 100 is past 1600


def test_without_it_no_time_is_near(clock: SimpleNamespace) -> None:
    clock.now = 1e12
    assert not Deadline(None).is_near(1e9)


def test_a_process_not_started_by_the_kit_counts_from_now(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(STARTED)
    clock.now = 5000.0
    assert not Deadline(1).is_near(0)
