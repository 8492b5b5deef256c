"""The host memory of offloaded optimizer state: its types and sizes, the check that a node has it, the allocation."""

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from common.log import logger
from common.platforms import available_memory
from common.training.launching.process_group import fail_together
from common.training.state.host_memory import host_buffer

MOMENTS = ("exp_avg", "exp_avg_sq")
# By OPTIMIZER_STATE; the kinds have Megatron-Core's names, and int16 are the remainders of master_weights.py.
HOST_TYPES = {
    "cpu": dict.fromkeys(("param", *MOMENTS), torch.float32),
    "cpu_bf16": {"param": torch.int16, **dict.fromkeys(MOMENTS, torch.bfloat16)},
}
REMEDY = {
    "cpu": "set OPTIMIZER_STATE to cpu_bf16, which needs half of it, or to bf16 or fp32",
    "cpu_bf16": "set OPTIMIZER_STATE to bf16 or fp32",
}
Kinds = dict[str, torch.Tensor]


def offloaded_params(optimizer: Any) -> list[torch.Tensor]:
    """The parameters of this DistributedOptimizer's Adam, in order: master weights, or in float32 the model's."""
    return [param for group in optimizer.optimizer.param_groups for param in group["params"]]


def offloaded_types(optimizer: Any, optimizer_state: str) -> dict[str, torch.dtype]:
    """The types of the kinds of state on the host; in float32 the model's weights are the master weights."""
    has_masters = any(optimizer.shard_fp32_from_float16_groups)
    return {kind: dtype for kind, dtype in HOST_TYPES[optimizer_state].items() if kind != "param" or has_masters}


def offloaded_bytes(optimizer: Any, optimizer_state: str) -> int:
    """The host memory that OffloadedState allocates for this DistributedOptimizer."""
    count = sum(param.numel() for param in offloaded_params(optimizer))
    return count * sum(dtype.itemsize for dtype in offloaded_types(optimizer, optimizer_state).values())


def check_host_memory(optimizers: list[Any], optimizer_state: str) -> None:
    """Raises KitError where a node has too little memory for the offloaded state of its processes.

    A collective call, before anything is allocated. optimizers: this process's DistributedOptimizers.
    """
    node = int(os.environ.get("GROUP_RANK", "0"))  # set by torchrun
    size = sum(offloaded_bytes(optimizer, optimizer_state) for optimizer in optimizers)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (node, size, available_memory()))
    for node in sorted({number for number, _, _ in ranks}):
        needed = [size for number, size, _ in ranks if number == node]
        available = min(free for number, _, free in ranks if number == node)
        if sum(needed) > available:
            fail_together(
                f"OPTIMIZER_STATE={optimizer_state} keeps {sum(needed) / 2**30:.1f} GiB in the memory of node {node},"
                f" for {len(needed)} processes, and {available / 2**30:.1f} GiB are available there: use more nodes,"
                f" give the container or job more memory, or {REMEDY[optimizer_state]}"
            )


def allocate(optimizer: Any, optimizer_state: str) -> tuple[Kinds, dict[str, dict[torch.Tensor, torch.Tensor]]]:
    """Zeros for each kind of state, in one buffer, pinned for a GPU: ({kind: [n]}, {kind: {parameter: its own}}).

    n: the elements of all parameters, one after the other. Raises KitError if the host does not have the memory.
    """
    params, types = offloaded_params(optimizer), offloaded_types(optimizer, optimizer_state)
    size, began = offloaded_bytes(optimizer, optimizer_state), time.monotonic()
    if not size:
        return {}, {kind: {} for kind in types}
    pinned = any(param.is_cuda for param in params)
    remedy = f"use more nodes, or {REMEDY[optimizer_state]}"
    buffer = host_buffer(size, f"OPTIMIZER_STATE={optimizer_state}", remedy, pinned=pinned).numpy()
    logger.info("host memory for the optimizer: %.1f GiB in %.1f s", size / 2**30, time.monotonic() - began)
    own: dict[str, dict[torch.Tensor, torch.Tensor]] = {}
    flat, start = {}, 0
    for kind, dtype in sorted(types.items(), key=lambda each: -each[1].itemsize):  # aligned, as each ends
        begin, own[kind] = start, {}
        for param in params:
            count = param.numel()
            # A storage that ends with the tensor: a writer copies what is part of a larger one.
            view = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start) if count else param.new_empty(0)
            own[kind][param] = view.to(dtype).view(param.shape)
            start += count * dtype.itemsize
        flat[kind] = torch.frombuffer(buffer, dtype=dtype, count=(start - begin) // dtype.itemsize, offset=begin)
    return flat, own
