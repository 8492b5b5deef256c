"""How many layouts are tried and for how long, as flags of `common.tune` and of `common.train` with --tune."""

import argparse
from dataclasses import dataclass

from common.errors import KitError


@dataclass(frozen=True)
class Trials:
    """The trials of a tuning; None in a command line is these defaults."""

    number: int = 5
    iterations: int = 8
    limit_min: float = 10.0


def add_trial_options(parser: argparse.ArgumentParser) -> None:
    """Adds --trials, --trial-iterations and --trial-limit-min, None where they are not given."""
    parser.add_argument("--trials", type=int, help=f"layouts to try (default: {Trials.number})")
    parser.add_argument(
        "--trial-iterations", type=int,
        help=f"steps of each, of which the second half counts (default: {Trials.iterations})",
    )  # fmt: skip
    parser.add_argument("--trial-limit-min", type=float, help=f"minutes for each (default: {Trials.limit_min:g})")


def trials_of(arguments: argparse.Namespace) -> Trials:
    """The trials that a command line asks for; raises KitError for a number that is too small."""
    for flag, number, least in (
        ("--trials", arguments.trials, 1),
        ("--trial-iterations", arguments.trial_iterations, 2),
        ("--trial-limit-min", arguments.trial_limit_min, 0.1),
    ):
        if number is not None and not number >= least:
            raise KitError(f"{flag}={number}: it must be at least {least}")
    return Trials(
        arguments.trials or Trials.number,
        arguments.trial_iterations or Trials.iterations,
        arguments.trial_limit_min or Trials.limit_min,
    )


def check_no_trials(arguments: argparse.Namespace) -> None:
    """Raises KitError if a command line without --tune says something of trials."""
    for name in ("trials", "trial_iterations", "trial_limit_min"):
        if getattr(arguments, name) is not None:
            raise KitError(f"--{name.replace('_', '-')} is for --tune FILE, which is not given")
