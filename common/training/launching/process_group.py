"""The process group of a run: initialization, seeds, agreement between ranks, destruction."""

import datetime
import os
import random
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from common.errors import KitError
from common.parallel import ParallelSizes, is_node_leader
from common.platforms.base import Platform
from common.training.launching.hang_detector import Heartbeat
from common.training.launching.nodes import differences, start_facts
from common.training.planning.plan import Start


@contextmanager
def process_group(platform: Platform, sizes: ParallelSizes, seed: int, timeout_min: int) -> Iterator[None]:
    """torch's and Megatron-Core's process groups, seeded, for the duration of the block.

    After an error they are not destroyed: the other ranks would not take part (rank_exit.exit_on_error).
    """
    if platform.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.backend, timeout=datetime.timedelta(minutes=timeout_min))
    parallel_state.initialize_model_parallel(
        sizes.tp,
        sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        distributed_timeout_minutes=timeout_min,
    )
    seed_everything(seed)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def check_same_start(start: Start) -> None:
    """Raises KitError unless every node is about to read the same weights; a collective call, made before they do."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), start_facts(start)) if is_node_leader() else None)
    (first, reference), *others = (each for each in found if each)
    texts = [(host, differences(reference, first, facts, host)) for host, facts in others]
    wrong = [f"{host} does not start from what {first} starts from: {text}" for host, text in texts if text]
    if wrong:
        fail_together(
            f"{'; '.join(wrong)}: put SAVE_CHECKPOINT_PATH on storage that all nodes share, and the same"
            " LOAD_CHECKPOINT_PATH or HF_MODEL_PATH on each"
        )


def fail_together(message: str) -> NoReturn:
    """For an error that every rank has found: raises KitError on one rank of each node, SystemExit on the others."""
    raise KitError(message) if is_node_leader() else SystemExit(2)


def seed_everything(seed: int) -> None:
    """Seeds every random number generator; pipeline stages differ, as in Megatron-LM's training/initialize.py."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every random number generator of this rank, for `restore_random_state`."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def errors_of_ranks(error: BaseException | None) -> list[str]:
    """`rank N: message` for each rank that passes an error, in rank order; a collective call."""
    flag = torch.tensor([error is not None], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if not flag.item():
        return []
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if error is None else first_line(error))
    return [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]


def new_data_group(sizes: ParallelSizes, timeout_min: int) -> Any:
    """A gloo group of this rank's tensor-parallel group, None if the rank is alone in it; a collective call."""
    if sizes.tp == 1:
        return None
    groups = [list(sizes.tp_group(first)) for first in range(0, sizes.world_size, sizes.tp)]
    own, _ = dist.new_subgroups_by_enumeration(groups, datetime.timedelta(minutes=timeout_min), "gloo")
    return own


class HostGroup:
    """A gloo group of all ranks for waits of any length: NCCL's collectives fail after the timeout.

    The constructor and each method are collective calls. A rank that hangs meanwhile is found by its own heartbeat.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        # gloo connects every pair of ranks, and the soft limit is often 1,024.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))

    def all_ready(self, ready: bool) -> bool:
        """Whether every rank is `ready`; returns when every rank has called."""
        flag = torch.tensor([ready], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group, async_op=True)
        pause = 0.0005
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            self.heartbeat.beat("waiting for the other ranks' saving")
        work.wait()
        return bool(flag.item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order on rank 0, an empty list elsewhere."""
        found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(value, found, group=self.group)
        return found or []


def first_line(error: BaseException) -> str:
    """The first line of `error`'s message, or of the OSError that caused it."""
    if isinstance(error.__context__, OSError):  # torch.save's writer then fails on its own position
        error = error.__context__
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"a file was not written in full ({text})" if "inline_container.cc" in text else text
