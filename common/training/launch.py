"""The start of a run's processes on this node: torchrun, among the other nodes where there are any."""

import os

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.run import parse_args, run

from common.errors import KitError
from common.log import logger
from common.settings import to_flags
from common.training.config import TrainSettings
from common.training.interfaces import address_towards, choose_gloo_interface
from common.training.nodes import facts_of
from common.training.plan import Plan
from common.training.rollcall import Roll, called_roll

DistNetworkError = getattr(dist, "DistNetworkError", RuntimeError)  # torch 2.1 has no name for it


def launch(plan: Plan) -> None:
    """Runs common.train under torchrun on this node; exits with the first failed process's code.

    Raises KitError when the nodes do not come together.
    """
    settings = plan.settings
    # torchrun's own default is 1, said in a warning: right beside a GPU, too few where the processor does the work.
    threads = len(os.sched_getaffinity(0)) // settings.gpus if plan.platform.device == "cpu" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    with called_roll(settings, facts_of(plan) if settings.nnodes > 1 else {}) as roll:
        address = address_towards(*settings.meeting_place)
        if roll:
            choose_gloo_interface(address)
        words = torchrun_words(settings, address, roll is not None and roll.serves)
        try:
            run(parse_args([*words, "-m", "common.train", *to_flags(settings)]))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            logger.error("process %d ended with exit code %d", rank, failure.exitcode)
            raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
        except SignalException as signal:  # torchrun has passed it on and waited for the processes
            raise SystemExit(128 + signal.sigval) from None
        except (DistNetworkError, RendezvousConnectionError) as error:
            raise KitError(_lost(settings, error)) from error
        except (RendezvousTimeoutError, RendezvousClosedError) as error:
            raise KitError(_not_together(settings, roll, error)) from error


def torchrun_words(settings: TrainSettings, address: str | None, serves: bool) -> list[str]:
    """torchrun's flags for this node, whose address is `address` and which `serves` the rendezvous or does not.

    Each one is given, so that none is taken from torchrun's variables (PET_...) in the environment.
    """
    seconds = 60 * settings.distributed_timeout_min
    words = ["--nproc-per-node", str(settings.gpus), "--nnodes", str(settings.nnodes)]
    words += ["--max-restarts", str(settings.max_restarts)]
    if not settings.rdzv_endpoint and not settings.max_restarts:
        return [
            *words,
            *("--node-rank", str(settings.node_rank), "--rdzv-backend", "static", "--rdzv-endpoint", ""),
            *("--master-addr", settings.master_addr, "--master-port", str(settings.master_port)),
            *("--rdzv-conf", f"timeout={seconds}"),
        ]
    # From torch 2.5 on the processes would share the store of the rendezvous, where a restart finds the addresses of
    # the processes before it, and a node that comes back finds none: each round gets a store of its own instead.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    alone = settings.nnodes == 1
    configuration = {"join_timeout": seconds, "read_timeout": seconds, "is_host": str(alone or serves).lower()}
    return [
        *words,
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", settings.rdzv_endpoint or "localhost:0"),
        *("--rdzv-id", settings.rdzv_id, "--local-addr", address or "localhost"),
        *("--rdzv-conf", ",".join(f"{name}={value}" for name, value in configuration.items())),
    ]


def _lost(settings: TrainSettings, error: Exception) -> str:
    told = str(error).splitlines()[0]
    if settings.rdzv_endpoint:
        return (
            f"RDZV_ENDPOINT={settings.rdzv_endpoint}: {told} The run has ended, or the node that serves it is gone:"
            " start the same command on all nodes again, it resumes"
        )
    return (
        f"MASTER_ADDR={settings.master_addr} MASTER_PORT={settings.master_port}: {told}:"
        " is the port taken by another run? Set MASTER_PORT to a free one"
    )


def _not_together(settings: TrainSettings, roll: Roll | None, error: Exception) -> str:
    if isinstance(error, RendezvousClosedError):
        return "the run was ended on another node, whose log tells why: start the same command on all nodes again"
    sent_away = f"; sent away: {'; '.join(roll.complaints())}" if roll and roll.complaints() else ""
    return (
        f"NNODES={settings.nnodes} nodes did not come together at RDZV_ENDPOINT={settings.rdzv_endpoint} within"
        f" DISTRIBUTED_TIMEOUT_MIN={settings.distributed_timeout_min}: start the same command on the others{sent_away}"
    )
