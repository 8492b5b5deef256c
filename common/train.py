"""Step 3: `python -m common.train` checks a run in one process, then starts its processes with torchrun.

Each of those runs this module again, finds torchrun's variables in its environment and trains.
"""

import argparse
import logging
import os

from common import errors, log, mcore
from common.errors import KitError
from common.log import logger
from common.platforms import check_machine, current
from common.settings import add_options, from_namespace
from common.training.config import TrainSettings
from common.training.interfaces import check_gloo_interface
from common.training.lifetime import end_with_parent
from common.training.plan import describe, plan_run
from common.training.tracking import check_tracking


def main() -> None:
    """Checks, launches or trains, whichever this process is for."""
    parser = argparse.ArgumentParser(
        prog="python -m common.train",
        usage="%(prog)s --flag value ...",  # there are many
        description=(__doc__ or "").split("\n")[0],
    )
    add_options(parser, TrainSettings)
    parser.add_argument("--check", action="store_true", help="check the settings, the model and the data, and stop")
    arguments = parser.parse_args()
    log.setup()
    settings = from_namespace(TrainSettings, arguments)
    platform = current()
    mcore.check_origin()
    worker = "TORCHELASTIC_RUN_ID" in os.environ
    if worker:
        log.quiet_libraries()
        mcore.prepare(platform)
        logger.setLevel(logging.WARNING)  # the process that started this one has told what the plan is
    try:
        plan = plan_run(settings, platform)
        check_tracking(settings)
        if settings.nnodes > 1:
            check_gloo_interface()
    except KitError as error:
        if settings.nnodes > 1 and not worker and not arguments.check:
            from common.training.rollcall import report_failure

            report_failure(settings, error)
        raise
    if worker:
        log.setup()
        from common.training.loop import run_plan  # imports Megatron-Core, which the check does not need

        with errors.exit_at_once():
            run_plan(plan)
        return
    describe(plan)
    if arguments.check:
        print("ok: the run can start")
        return
    check_machine(platform)
    from common.training.launch import launch  # imports torchrun

    launch(plan)


if __name__ == "__main__":
    errors.run(main)
elif __name__ == "__mp_main__":  # a rank has spawned this process
    end_with_parent()
