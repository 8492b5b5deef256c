"""`python -m common.tune --output FILE FLAGS OF common.train`: tries the estimate's best layouts on these GPUs.

Step 3 runs it as `bash nvidia/3_run_mcore_qwen.sh -- --tune FILE`, with its own settings and environment.
"""

import argparse
import sys
from pathlib import Path

from common import errors, log
from common.engine.overrides import join_words
from common.errors import KitError
from common.platforms import current
from common.settings import add_options, from_namespace
from common.training.settings import TrainSettings
from common.tune.candidates import with_open_layout
from common.tune.tuning import ITERATIONS, LIMIT_MIN, TRIALS, tune


def main() -> None:
    """Prints the table and writes the file; exits 2 if no layout fits or none ran."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tune", usage="%(prog)s --output FILE --flag value ...", description=__doc__
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the settings file to write")
    parser.add_argument("--trials", type=int, default=TRIALS, help="layouts to try (default: %(default)s)")
    parser.add_argument(
        "--trial-iterations", type=int, default=ITERATIONS,
        help="steps of each, of which the second half counts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--trial-limit-min", type=float, default=LIMIT_MIN, help="minutes for each (default: %(default)s)"
    )
    add_options(parser, TrainSettings)
    arguments = parser.parse_args(join_words(sys.argv[1:]))
    for name, least in (("trials", 1), ("trial_iterations", 2)):
        if getattr(arguments, name) < least:
            raise KitError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: it must be at least {least}")
    log.setup()
    tune(
        from_namespace(TrainSettings, with_open_layout(arguments)), current(), arguments.output,
        trials=arguments.trials, iterations=arguments.trial_iterations, limit_min=arguments.trial_limit_min,
    )  # fmt: skip


if __name__ == "__main__":
    errors.run(main)
