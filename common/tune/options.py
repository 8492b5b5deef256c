"""How many layouts are tried and for how long, as flags of `common.tune` and of `common.train` with --tune."""

import argparse
from dataclasses import dataclass
from typing import Any

from common.errors import KitError

LEAST = {"trials": 1, "trial_iterations": 2, "trial_limit_min": 0.1}


@dataclass(frozen=True)
class Trials:
    """The trials of a tuning; each field is a flag."""

    trials: int = 5
    trial_iterations: int = 8
    trial_limit_min: float = 10.0


def add_trial_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of Trials, None where they are not given."""
    parser.add_argument("--trials", type=int, help=f"layouts to try (default: {Trials.trials})")
    parser.add_argument(
        "--trial-iterations", type=int,
        help=f"steps of each, of which the second half counts (default: {Trials.trial_iterations})",
    )  # fmt: skip
    parser.add_argument("--trial-limit-min", type=float, help=f"minutes for each (default: {Trials.trial_limit_min:g})")


def trials_of(arguments: argparse.Namespace) -> Trials:
    """The trials that a command line asks for; raises KitError for a number that is too small."""
    given = _given(arguments)
    for name, number in given.items():
        if not number >= LEAST[name]:
            raise KitError(f"{_flag(name)}={number}: it must be at least {LEAST[name]}")
    return Trials(**given)


def check_no_trials(arguments: argparse.Namespace) -> None:
    """Raises KitError if a command line without --tune says something of trials."""
    for name in _given(arguments):
        raise KitError(f"{_flag(name)} is for --tune FILE, which is not given")


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in LEAST if (value := getattr(arguments, name)) is not None}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
