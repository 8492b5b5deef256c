"""The launcher: runs torchrun's elastic agent in this process, which starts this node's ranks and watches them."""

import os
import signal
import time
from collections.abc import Callable
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

from common.errors import STOPPED, KitError
from common.log import logger
from common.ports import free_port
from common.settings import to_flags
from common.start import from_kit
from common.training.launching.agent_patches import keep_rendezvous, limit_shutdown
from common.training.launching.interfaces import address_towards, select_gloo_interface
from common.training.launching.nodes import facts_of
from common.training.launching.preflight import Preflight, preflight_check
from common.training.launching.rank_exit import STOPPED_AT, TRACEBACK, exit_reasons, log_failure, read_exit_reason
from common.training.planning import determinism
from common.training.planning.deadline import STARTED
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings

DistNetworkError = getattr(dist, "DistNetworkError", RuntimeError)  # torch 2.1 lacks it
OnFailure = Callable[[int, list[str]], None]


def launch(plan: Plan, on_failure: OnFailure) -> None:
    """Runs common.train under torchrun on this node; exits with the first failed rank's code, or STOPPED.

    `on_failure` gets the rank of this node that failed first, and what is logged of it. Raises KitError when the
    preflight check or the rendezvous fails.
    """
    settings = plan.settings
    set_environment(plan)
    facts = facts_of(plan) if settings.nnodes > 1 else {}
    with exit_reasons(), preflight_check(settings, facts) as preflight:
        run_agent(with_port(settings), preflight, on_failure)
        stopped_at = read_exit_reason(STOPPED_AT, 0)
    if stopped_at:
        logger.info("%s; the same command resumes from there (exit code %d)", stopped_at, STOPPED)
        raise SystemExit(STOPPED)


def set_environment(plan: Plan) -> None:
    """Sets the variables that torchrun and the ranks read; those that the user has set stay."""
    if plan.settings.deterministic:
        os.environ.update(determinism.environment())
    # torchrun's own default is 1, with a warning: right with a GPU, too few where the CPU computes.
    threads = len(os.sched_getaffinity(0)) // plan.settings.gpus if plan.platform.device == "cpu" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    os.environ[STARTED] = str(time.time())
    # A rank exits at once on torchrun's SIGTERM (signals.py); torchrun kills one that does not after this many seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    limit_shutdown(int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]))
    keep_rendezvous()


def run_agent(settings: TrainSettings, preflight: Preflight | None, on_failure: OnFailure) -> None:
    """Returns when all ranks have succeeded; else raises KitError, or SystemExit with the first failed rank's code."""
    address = address_towards(*settings.meeting_place)
    if preflight:
        select_gloo_interface(address)
    arguments = torchrun_arguments(settings, address)
    try:
        with from_kit():
            run(parse_args([*arguments, "-m", "common.train", *to_flags(settings)]))
    except ChildFailedError as error:
        rank, messages = describe_first_failure(error)
        log_failure(messages)
        on_failure(rank, messages)
        raise SystemExit(max(error.failures[rank].exitcode, 0) or 1) from None
    except SignalException as error:  # SIGQUIT: torchrun has ended the ranks
        raise SystemExit(128 + error.sigval) from None
    except (DistNetworkError, RendezvousConnectionError) as error:
        raise KitError(_describe_lost_store(settings, error)) from error
    except (RendezvousTimeoutError, RendezvousClosedError) as error:
        raise KitError(_describe_rendezvous_failure(settings, preflight, error)) from error


def with_port(settings: TrainSettings) -> TrainSettings:
    """`settings` with a free MASTER_PORT where a run on one node leaves it unset."""
    if settings.nnodes > 1 or settings.master_port or settings.rdzv_endpoint:
        return settings
    return replace(settings, master_port=free_port())


def describe_first_failure(error: ChildFailedError) -> tuple[int, list[str]]:
    """The rank that failed first, and messages: how and, last, its traceback if it wrote one."""
    # A rank that was killed is the cause, though the others' errors may come before torchrun has noticed it.
    rank, failure = min(error.failures.items(), key=lambda each: (each[1].exitcode >= 0, each[1].timestamp))
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ": is the host out of memory (dmesg)?" if name == "SIGKILL" else ""
        messages = [f"rank {rank} failed first, killed by {name}{hint}"]
    else:
        messages = [f"rank {rank} failed first, with exit code {failure.exitcode}"]
    if text := read_exit_reason(TRACEBACK, failure.local_rank):
        messages.append(f"traceback of rank {rank}:\n{text}")
    return rank, messages


def torchrun_arguments(settings: TrainSettings, address: str | None) -> list[str]:
    """torchrun's flags for this node, whose address is `address`.

    Every flag is given, so that torchrun takes none from its variables (PET_...) in the environment.
    """
    timeout_s = 60 * settings.distributed_timeout_min
    common = ["--nproc-per-node", str(settings.gpus), "--nnodes", str(settings.nnodes)]
    common += ["--max-restarts", str(settings.max_restarts), "--monitor-interval", "0.2"]
    if not settings.rdzv_endpoint and not settings.max_restarts:
        return [
            *common,
            *("--node-rank", str(settings.node_rank), "--rdzv-backend", "static", "--rdzv-endpoint", ""),
            *("--master-addr", settings.master_addr, "--master-port", str(settings.meeting_place[1])),
            *("--rdzv-conf", f"timeout={timeout_s}"),
        ]
    # Since torch 2.5 the ranks would share the rendezvous store, where a restart finds the addresses of the ranks
    # before it, and a node that comes back finds none: each round gets a store of its own instead.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # The preflight check's store is the rendezvous's: torch 2.1 opens no second one on its port, even in its process.
    is_host = str(settings.nnodes == 1).lower()
    configuration = {"join_timeout": timeout_s, "read_timeout": timeout_s, "is_host": is_host}
    return [
        *common,
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", settings.rdzv_endpoint or "localhost:0"),
        *("--rdzv-id", settings.rdzv_id, "--local-addr", address or "localhost"),
        *("--rdzv-conf", ",".join(f"{name}={value}" for name, value in configuration.items())),
    ]


def _describe_lost_store(settings: TrainSettings, error: Exception) -> str:
    cause = str(error).splitlines()[0]
    if settings.rdzv_endpoint:
        return (
            f"RDZV_ENDPOINT={settings.rdzv_endpoint}: {cause} The run has ended, or the node that hosts the rendezvous"
            " is gone: start the same command on all nodes again, it resumes"
        )
    return (
        f"MASTER_ADDR={settings.master_addr} MASTER_PORT={settings.meeting_place[1]}: {cause}:"
        " does another run use the port? Set MASTER_PORT to a free one"
    )


def _describe_rendezvous_failure(settings: TrainSettings, preflight: Preflight | None, error: Exception) -> str:
    if isinstance(error, RendezvousClosedError):
        return "the run has ended on another node, see its log: start the same command on all nodes again"
    rejected = f"; rejected: {'; '.join(preflight.problems())}" if preflight and preflight.problems() else ""
    return (
        f"NNODES={settings.nnodes} nodes did not join RDZV_ENDPOINT={settings.rdzv_endpoint} within"
        f" DISTRIBUTED_TIMEOUT_MIN={settings.distributed_timeout_min}: start the same command on the others{rejected}"
    )
