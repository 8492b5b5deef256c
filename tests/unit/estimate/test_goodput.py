"""Goodput: Daly's model against a simulation of it, its best interval against a search."""

import math
import random

import pytest

from common.estimate.goodput import (
    LLAMA_3_GPU_MTBF_HOURS,
    Interruptions,
    best_interval,
    best_steps,
    seconds_between_faults,
    shares,
)

HOUR = 3600.0
SYNCHRONOUS = Interruptions(between_faults=3 * HOUR, stall=60.0, write=60.0, recovery=600.0)
ASYNCHRONOUS = Interruptions(between_faults=3 * HOUR, stall=30.0, write=600.0, recovery=600.0)
RUNS = {
    "synchronous": SYNCHRONOUS,
    "asynchronous": ASYNCHRONOUS,
    "many faults": Interruptions(0.5 * HOUR, 60.0, 60.0, 300.0),
    "few faults": Interruptions(200 * HOUR, 500.0, 500.0, 1200.0),
}


def young(lost: Interruptions) -> float:
    return math.sqrt(2 * lost.stall * lost.between_faults)


def daly(lost: Interruptions) -> float:
    """Equation 37 of the paper, for a stall below twice the mean between faults."""
    root = math.sqrt(lost.stall / (2 * lost.between_faults))
    return young(lost) * (1 + root / 3 + root**2 / 9) - lost.stall


def simulated(lost: Interruptions, interval: float, faults: int = 20_000) -> float:
    """The goodput of a run with that many faults, save by save; each save is complete before the next begins."""
    assert interval >= lost.behind
    chance = random.Random(1)
    now = trained = 0.0
    for _ in range(faults):
        fault = now + chance.expovariate(1 / lost.between_faults)
        saves: list[tuple[float, float]] = []  # when it is complete, and what was trained by then
        while now < fault:
            now, trained = now + interval + lost.stall, trained + interval
            saves.append((now + lost.behind, trained))
        undone = sum(complete > fault for complete, _ in saves)
        now, trained = fault, trained - undone * interval
        while (again := chance.expovariate(1 / lost.between_faults)) < lost.recovery:
            now += again
        now += lost.recovery
    return trained / now


def searched(lost: Interruptions) -> float:
    """The best interval of a fine grid around Young's."""
    return max((young(lost) * (0.2 + i / 2000) for i in range(4000)), key=lambda t: shares(lost, t).trains)


@pytest.mark.parametrize("name", RUNS)
def test_the_share_that_trains_is_a_simulations(name: str) -> None:
    lost = RUNS[name]
    for interval in (best_interval(lost), best_interval(lost) * 2.5):
        assert shares(lost, interval).trains == pytest.approx(simulated(lost, interval), rel=0.015)


@pytest.mark.parametrize("name", RUNS)
def test_the_best_interval_is_that_of_a_search_and_near_youngs_and_dalys(name: str) -> None:
    lost = RUNS[name]
    if name == "asynchronous":  # a save waits for the one before it
        assert best_interval(lost) > lost.behind
    assert best_interval(lost) == pytest.approx(searched(lost), rel=2e-3)
    assert best_interval(lost) == pytest.approx(daly(lost), rel=1e-3)
    assert best_interval(lost) == pytest.approx(young(lost), rel=0.2)
    if lost.stall < lost.between_faults / 100:
        assert shares(lost, young(lost)).trains == pytest.approx(shares(lost, best_interval(lost)).trains, rel=5e-4)


def test_the_best_interval_is_the_best_of_simulations_too() -> None:
    best = best_interval(SYNCHRONOUS)
    rates = {times: simulated(SYNCHRONOUS, best * times) for times in (0.4, 1, 2.5)}
    assert max(rates, key=lambda times: rates[times]) == 1


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_it_is_what_dalys_figures_3_to_5_show(hours: float, minutes: float) -> None:
    lost = Interruptions(between_faults=hours * HOUR, stall=300.0, write=300.0, recovery=600.0)
    assert best_interval(lost) / 60 == pytest.approx(minutes, rel=0.01)


def test_llama_3_trained_over_90_percent_with_one_fault_in_three_hours() -> None:
    """405 billion parameters, 14 bytes each, at the 2 TB/s of its file system (section 3.3.1)."""
    between = seconds_between_faults(16_384, LLAMA_3_GPU_MTBF_HOURS)
    assert between == pytest.approx(3.1 * HOUR, rel=0.01)
    save = 14 * 405e9 / 2e12
    for recovery in (300, 720):
        lost = Interruptions(between, save, save, recovery + save)
        assert 0.9 < shares(lost, best_interval(lost)).trains < 0.97


def test_the_shares_are_all_of_the_time() -> None:
    for lost in RUNS.values():
        split = shares(lost, best_interval(lost))
        assert split.trains + split.saves + split.recovers + split.repeats == pytest.approx(1)
        assert min(split.trains, split.saves, split.recovers, split.repeats) > 0
    # Where both are short, half of an interval and its save is lost a fault, and a save an interval.
    few = RUNS["few faults"]
    split, interval = shares(few, 2 * HOUR), 2 * HOUR
    assert split.saves == pytest.approx(few.stall / (interval + few.stall), rel=0.03)
    assert split.repeats == pytest.approx((interval + few.stall) / 2 / few.between_faults, rel=0.03)
    assert split.recovers == pytest.approx(few.recovery / few.between_faults, rel=0.03)


def test_a_save_before_the_last_one_is_written_waits_for_it() -> None:
    waits = shares(ASYNCHRONOUS, 20.0)
    assert waits.saves == pytest.approx(waits.trains * 580 / 20)
    assert best_interval(Interruptions(HOUR, 0.01, 120.0, 60.0)) == pytest.approx(119.99)
    assert best_interval(Interruptions(HOUR, 0.0, 0.0, 60.0)) == 0


@pytest.mark.parametrize("step", [1.0, 7.0, 400.0, 900.0, 5000.0])
def test_the_best_save_interval_is_the_best_whole_number_of_steps(step: float) -> None:
    best = max(range(1, 3000), key=lambda steps: shares(SYNCHRONOUS, steps * step).trains)
    assert best_steps(SYNCHRONOUS, step) == best


def test_a_run_that_never_gets_to_its_save_trains_nothing() -> None:
    split = shares(Interruptions(1.0, 10.0, 10.0, 5000.0), 1e6)
    assert split.trains == 0 and split.recovers == 1
