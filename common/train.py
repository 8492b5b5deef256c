"""Step 3: `python -m common.train` checks a run in one process, then launches its ranks with torchrun.

Each rank runs this module again, finds torchrun's variables in its environment, and trains.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common import errors, log
from common.engine import installation
from common.engine.overrides import join_words
from common.errors import KitError
from common.log import logger
from common.platforms import check_machine, current
from common.platforms.base import Platform
from common.settings import add_options, check_environment, from_namespace
from common.start import importing
from common.training.launching import signals
from common.training.launching.parent_death import set_parent_death_signal
from common.training.launching.rank_exit import exit_now, exit_on_error
from common.training.planning import determinism
from common.training.settings import TrainSettings
from common.tune.options import add_trial_options, check_no_trials, trials_of

if TYPE_CHECKING:
    from common.training.planning.plan import Plan


def main() -> None:
    """Trains in a rank; elsewhere checks the run and launches it."""
    parser = argparse.ArgumentParser(
        prog="python -m common.train",
        usage="%(prog)s --flag value ...",  # there are many
        description=(__doc__ or "").split("\n")[0],
    )
    add_options(parser, TrainSettings)
    parser.add_argument("--check", action="store_true", help="check the settings, the model and the data, and stop")
    parser.add_argument(
        "--tune", type=Path, metavar="FILE",
        help="try the estimate's best layouts on this machine's GPUs, write the fastest to FILE, and stop",
    )  # fmt: skip
    add_trial_options(parser)
    arguments = parser.parse_args(join_words(sys.argv[1:]))
    log.setup()
    if arguments.tune:
        tune_layout(arguments)
        return
    check_no_trials(arguments)
    settings = from_namespace(TrainSettings, arguments)
    installation.check_origin()
    signals.block_stop_signals()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        train(settings)
    else:
        launch(settings, check_only=arguments.check)


def tune_layout(arguments: argparse.Namespace) -> None:
    """Tries layouts of a run and writes the fastest to the file of --tune."""
    from common.tune.candidates import with_open_layout
    from common.tune.tuning import tune  # reads the settings of a run, and starts this module for each trial

    settings = from_namespace(TrainSettings, with_open_layout(arguments))
    installation.check_origin()
    tune(settings, current(), arguments.tune, trials_of(arguments))


def train(settings: TrainSettings) -> None:
    """Trains: what each rank runs."""
    set_parent_death_signal()
    stop_requests = signals.listen_in_rank()
    platform = current()
    log.quiet_libraries()
    with importing():
        installation.prepare(platform)
        if settings.deterministic:
            determinism.apply()
        from common.training.loop.run import run_plan  # imports Megatron-Core, which the check does not need
        from common.training.planning.plan import plan_run
    logger.setLevel(logging.WARNING)  # the launcher has logged the plan
    plan = plan_run(settings, platform)
    log.setup()
    with exit_on_error():
        run_plan(plan, stop_requests)
    exit_now(0)


def launch(settings: TrainSettings, *, check_only: bool) -> None:
    """Checks the run, and launches its ranks unless `check_only`: what the user's command runs."""
    signals.listen_in_launcher()
    plan = check(settings, report=not check_only)
    from common.training.planning.description import describe

    describe(plan)
    if check_only:
        print("ok: the run can start")
        return
    with importing():
        from common.training.launching import launcher  # imports torchrun
        from common.training.tracking.run_record import FailureRecord

    launcher.launch(plan, FailureRecord(Path(settings.save_checkpoint_path)).add)


def check(settings: TrainSettings, *, report: bool) -> "Plan":
    """The plan of a run that passes every check of this machine; else raises KitError, or OSError.

    report: also tell the other nodes of a failure, so that they need not wait for this one.
    """
    try:
        return checked_plan(settings, current())
    except (KitError, OSError) as error:
        if settings.nnodes > 1 and report:
            from common.training.launching.preflight import report_failure

            report_failure(settings, error)
        raise


def checked_plan(settings: TrainSettings, platform: Platform) -> "Plan":
    """The plan of a run, once settings, machine, packages, data, folders and memory are checked."""
    with importing():
        from common.estimate.check import check_host_memory, check_memory
        from common.estimate.suggestion import suggest_layers
        from common.training.checkpointing.folder_lock import check_lock
        from common.training.checkpointing.run_folder import check_folder
        from common.training.launching.interfaces import check_gloo_interface
        from common.training.planning.compatibility import check_packages
        from common.training.planning.devices import check_devices, check_temporary_folder
        from common.training.planning.plan import plan_run
        from common.training.tracking.tracker import check_tracking

    check_environment(settings)
    check_machine(platform)
    check_devices(settings, platform)
    check_packages(settings, platform)
    check_temporary_folder(settings.num_workers)
    if settings.train_or_convert_ckpt == "train" and settings.nnodes == 1:  # a node that rejoins meets its own run's
        check_lock(Path(settings.save_checkpoint_path))  # first: the run that is waited for may save
    plan = plan_run(settings, platform)
    check_tracking(settings)
    if plan.train:
        check_folder(plan)
        check_memory(plan)
        check_host_memory(plan)
        suggest_layers(plan)
    if settings.nnodes > 1:
        check_gloo_interface()
    return plan


if __name__ == "__main__":
    errors.run(main)
