"""A shim for what gloo lacks before torch 2.3, so that the distributed optimizer runs on a CPU there too.

Such a gloo has no reduce-scatter, no all-gather into one tensor and no bfloat16; NCCL and MCCL have them. Only the CPU
platform uses the shim, so tests of distributed training on such a torch depend on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from common.platforms.cuda_shim import TORCH

_gloos_all_reduce = dist.all_reduce


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    """`tensor` becomes the sum of all ranks'; bfloat16 is summed in float32 and rounded once."""
    if tensor.dtype is not torch.bfloat16:
        return _gloos_all_reduce(tensor, op, group, async_op)
    wide = tensor.float()
    _gloos_all_reduce(wide, op, group)
    tensor.copy_(wide)
    return Done() if async_op else None


def reduce_scatter_tensor(
    output: torch.Tensor, input: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Writes this rank's part of the sum of all ranks' `input` to `output`; needs a copy of `input`."""
    total = input.clone()
    all_reduce(total, op, group)
    rank = dist.get_rank(group)
    output.copy_(total.view(-1)[rank * output.numel() : (rank + 1) * output.numel()].view_as(output))
    return Done() if async_op else None


def all_gather_into_tensor(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Writes all ranks' `input_tensor`, concatenated in rank order, to `output_tensor`."""
    as_bytes = output_tensor.view(-1).view(torch.uint8)
    parts = list(as_bytes.chunk(dist.get_world_size(group)))
    dist.all_gather(parts, input_tensor.contiguous().view(-1).view(torch.uint8), group)
    return Done() if async_op else None


class Done:
    """The work handle of a completed operation."""

    def wait(self) -> None:
        """Returns at once."""


@contextmanager
def one_by_one(*args: Any, **kwargs: Any) -> Iterator[Done]:
    """Replaces the coalescing manager: runs each collective of the block as it is called, not all at its end."""
    yield Done()


def install() -> None:
    """Installs the shim in this process if torch needs it; to be called before Megatron-Core is imported."""
    if TORCH < (2, 3):
        names: Any = dist
        names.all_reduce = all_reduce
        names.reduce_scatter_tensor = names._reduce_scatter_base = reduce_scatter_tensor
        names.all_gather_into_tensor = names._all_gather_base = all_gather_into_tensor
        names._coalescing_manager = one_by_one
