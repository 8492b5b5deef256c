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
from common.platforms.base import Platform
from common.settings import add_options, from_namespace, to_flags
from common.training.config import TrainSettings
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
    plan = plan_run(settings, platform)
    check_tracking(settings)
    if worker:
        log.setup()
        from common.training.loop import run_plan  # imports Megatron-Core, which the check does not need

        run_plan(plan)
        return
    describe(plan)
    if arguments.check:
        print("ok: the run can start")
        return
    check_machine(platform)
    launch(settings, platform)


def launch(settings: TrainSettings, platform: Platform) -> None:
    """Runs this module under torchrun on this node; exits with the first failed process's code."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # torchrun's own default is 1, said in a warning: right beside a GPU, too few where the processor does the work.
    threads = len(os.sched_getaffinity(0)) // settings.gpus if platform.device == "cpu" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    words = [
        *("--nproc-per-node", str(settings.gpus)),
        *("--nnodes", str(settings.nnodes), "--node-rank", str(settings.node_rank)),
        *("--master-addr", settings.master_addr, "--master-port", str(settings.master_port)),
        *("-m", "common.train"),
    ]
    try:
        run(parse_args([*words, *to_flags(settings)]))
    except getattr(dist, "DistNetworkError", RuntimeError) as error:  # torch 2.1 has no name for it
        raise KitError(
            f"MASTER_ADDR={settings.master_addr} MASTER_PORT={settings.master_port}: {str(error).splitlines()[0]}:"
            " is the port taken by another run? Set MASTER_PORT to a free one"
        ) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        logger.error("process %d ended with exit code %d", rank, failure.exitcode)
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None


if __name__ == "__main__":
    errors.run(main)
