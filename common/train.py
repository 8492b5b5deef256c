"""Step 3: `python -m common.train` checks a run in one process, then starts its processes with torchrun.

Each of those runs this module again, finds torchrun's variables in its environment and trains.
"""

import argparse
import logging
import os
import sys

from common import errors, log
from common.engine import installation
from common.engine.overrides import join_words
from common.errors import KitError
from common.log import logger
from common.platforms import check_machine, current
from common.settings import add_options, check_environment, from_namespace
from common.training.launching import signals
from common.training.launching.parent_death import end_with_parent
from common.training.planning import determinism
from common.training.settings import TrainSettings


def main() -> None:
    """Checks, launches or trains, whichever this process is for."""
    parser = argparse.ArgumentParser(
        prog="python -m common.train",
        usage="%(prog)s --flag value ...",  # there are many
        description=(__doc__ or "").split("\n")[0],
    )
    add_options(parser, TrainSettings)
    parser.add_argument("--check", action="store_true", help="check the settings, the model and the data, and stop")
    arguments = parser.parse_args(join_words(sys.argv[1:]))
    log.setup()
    settings = from_namespace(TrainSettings, arguments)
    installation.check_origin()
    signals.hold()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        train(settings)
    else:
        launch(settings, check_only=arguments.check)


def train(settings: TrainSettings) -> None:
    """What a rank does."""
    end_with_parent()
    requests = signals.listen_in_rank()
    platform = current()
    log.quiet_libraries()
    installation.prepare(platform)
    if settings.deterministic:
        determinism.apply()
    logger.setLevel(logging.WARNING)  # the process that started this one has told what the plan is
    from common.training.planning.plan import plan_run

    plan = plan_run(settings, platform)
    log.setup()
    from common.training.loop.run import run_plan  # imports Megatron-Core, which the check does not need

    with errors.exit_at_once():
        run_plan(plan, requests)


def launch(settings: TrainSettings, *, check_only: bool) -> None:
    """What the user's command does: checks, and starts the ranks unless `check_only`."""
    signals.listen_in_launcher()
    from common.estimate.check import check_host_memory, check_memory
    from common.training.launching.interfaces import check_gloo_interface
    from common.training.loop.tracking import check_tracking
    from common.training.planning.compatibility import check_packages
    from common.training.planning.devices import check_devices
    from common.training.planning.plan import describe, plan_run
    from common.training.state.run_folder import check_folder

    platform = current()
    try:
        check_environment(settings)
        check_machine(platform)
        check_devices(settings, platform)
        check_packages(settings, platform)
        plan = plan_run(settings, platform)
        check_tracking(settings)
        if plan.train:
            check_folder(plan)
            check_memory(plan)
            check_host_memory(plan)
        if settings.nnodes > 1:
            check_gloo_interface()
    except KitError as error:
        if settings.nnodes > 1 and not check_only:
            from common.training.launching.preflight import report_failure

            report_failure(settings, error)
        raise
    describe(plan)
    if check_only:
        print("ok: the run can start")
        return
    from common.training.launching.launcher import launch as start  # imports torchrun

    start(plan)


if __name__ == "__main__":
    errors.run(main)
