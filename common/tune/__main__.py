"""`python -m common.tune --output FILE FLAGS OF common.train`: tries the estimate's best layouts on these GPUs.

Step 3 runs it as `bash nvidia/3_run_mcore_qwen.sh -- --tune FILE`, with its own settings and environment.
"""

import argparse
import sys
from pathlib import Path

from common import errors, log
from common.engine.overrides import join_words
from common.platforms import current
from common.settings import add_options, from_namespace
from common.training.settings import TrainSettings
from common.tune.candidates import with_open_layout
from common.tune.options import add_trial_options, trials_of
from common.tune.tuning import tune


def main() -> None:
    """Prints the table and writes the file; exits 2 if no layout fits or none ran."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tune", usage="%(prog)s --output FILE --flag value ...", description=__doc__
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the settings file to write")
    add_trial_options(parser)
    add_options(parser, TrainSettings)
    arguments = parser.parse_args(join_words(sys.argv[1:]))
    trials = trials_of(arguments)
    log.setup()
    tune(from_namespace(TrainSettings, with_open_layout(arguments)), current(), arguments.output, trials)


if __name__ == "__main__":
    errors.run(main)
