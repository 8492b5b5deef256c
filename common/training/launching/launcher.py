"""The start of a run's processes on this node: torchrun, among the other nodes where there are any."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.run import parse_args, run

from common.errors import LAST_WORDS, KitError, left_word
from common.log import logger
from common.settings import to_flags
from common.start import from_kit
from common.training.launching.interfaces import address_towards, choose_gloo_interface
from common.training.launching.nodes import facts_of
from common.training.launching.preflight import Roll, called_roll
from common.training.launching.signals import STOPPED
from common.training.planning import determinism
from common.training.planning.deadline import STARTED
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings

DistNetworkError = getattr(dist, "DistNetworkError", RuntimeError)  # torch 2.1 has no name for it


def launch(plan: Plan) -> None:
    """Runs common.train under torchrun on this node; exits with the first failed process's code, or STOPPED.

    Raises KitError when the nodes do not come together.
    """
    settings = plan.settings
    if settings.deterministic:
        os.environ.update(determinism.environment())
    # torchrun's own default is 1, said in a warning: right beside a GPU, too few where the processor does the work.
    threads = len(os.sched_getaffinity(0)) // settings.gpus if plan.platform.device == "cpu" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    os.environ[STARTED] = str(time.time())
    # A rank ends at once when torchrun ends it (signals.py); one that is held up is killed after so many seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    facts = facts_of(plan) if settings.nnodes > 1 else {}
    with last_words(), called_roll(settings, facts) as roll:
        run_ranks(with_port(settings), roll)
        stopped = left_word("stopped", 0)
    if stopped:
        logger.info("%s; the same command goes on from there (exit code %d)", stopped, STOPPED)
        raise SystemExit(STOPPED)


def run_ranks(settings: TrainSettings, roll: Roll | None) -> None:
    """Returns when all ranks of the run have ended well; else raises KitError, or SystemExit with the first's code."""
    address = address_towards(*settings.meeting_place)
    if roll:
        choose_gloo_interface(address)
    words = torchrun_words(settings, address, roll is not None and roll.serves)
    try:
        with from_kit():
            run(parse_args([*words, "-m", "common.train", *to_flags(settings)]))
    except ChildFailedError as error:
        raise SystemExit(_tell_failure(error)) from None
    except SignalException as error:  # SIGQUIT: torchrun has ended the processes
        raise SystemExit(128 + error.sigval) from None
    except (DistNetworkError, RendezvousConnectionError) as error:
        raise KitError(_lost(settings, error)) from error
    except (RendezvousTimeoutError, RendezvousClosedError) as error:
        raise KitError(_not_together(settings, roll, error)) from error


@contextmanager
def last_words() -> Iterator[None]:
    """Ranks that are started in the block leave there what they have to say at their end, for this process to read."""
    with tempfile.TemporaryDirectory(prefix="kit-") as folder:
        os.environ[LAST_WORDS] = folder
        yield


def with_port(settings: TrainSettings) -> TrainSettings:
    """`settings` with a port that is free, where they name none and one node needs one."""
    if settings.nnodes > 1 or settings.master_port or settings.rdzv_endpoint:
        return settings
    with socket.socket() as probe:
        probe.bind(("", 0))
        return replace(settings, master_port=int(probe.getsockname()[1]))


def _tell_failure(error: ChildFailedError) -> int:
    """Says which process ended first and, last, its traceback; the exit code that goes with it."""
    # One that was killed is the cause, and the others' complaints of it may come before torchrun has seen it.
    rank, failure = min(error.failures.items(), key=lambda each: (each[1].exitcode >= 0, each[1].timestamp))
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ": is the host's memory used up (dmesg)?" if name == "SIGKILL" else ""
        logger.error("rank %d was ended first, by %s%s", rank, name, hint)
    else:
        logger.error("rank %d ended first, with exit code %d", rank, failure.exitcode)
    if text := left_word("error", failure.local_rank):
        logger.error("traceback of rank %d:\n%s", rank, text)
    return failure.exitcode if failure.exitcode > 0 else 1


def torchrun_words(settings: TrainSettings, address: str | None, serves: bool) -> list[str]:
    """torchrun's flags for this node, whose address is `address` and which `serves` the rendezvous or does not.

    Each one is given, so that none is taken from torchrun's variables (PET_...) in the environment.
    """
    seconds = 60 * settings.distributed_timeout_min
    words = ["--nproc-per-node", str(settings.gpus), "--nnodes", str(settings.nnodes)]
    words += ["--max-restarts", str(settings.max_restarts), "--monitor-interval", "0.2"]
    if not settings.rdzv_endpoint and not settings.max_restarts:
        return [
            *words,
            *("--node-rank", str(settings.node_rank), "--rdzv-backend", "static", "--rdzv-endpoint", ""),
            *("--master-addr", settings.master_addr, "--master-port", str(settings.meeting_place[1])),
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
        f"MASTER_ADDR={settings.master_addr} MASTER_PORT={settings.meeting_place[1]}: {told}:"
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
