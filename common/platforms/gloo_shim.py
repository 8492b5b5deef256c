"""A stand-in for what gloo lacks before torch 2.3, so that the distributed optimizer runs on a CPU there too.

gloo has no reduce-scatter and no all-gather into one tensor then, and takes no bfloat16; NCCL and MCCL do. This file
alone stands in for that, on the CPU platform alone: what is tested on such a torch rests on it.
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
    """This rank's part of the sum of all ranks' `input` goes to `output`; takes as much memory as `input` again."""
    total = input.clone()
    all_reduce(total, op, group)
    rank = dist.get_rank(group)
    output.copy_(total.view(-1)[rank * output.numel() : (rank + 1) * output.numel()].view_as(output))
    return Done() if async_op else None


def all_gather_into_tensor(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """All ranks' `input_tensor`, one behind the other, go to `output_tensor`."""
    as_bytes = output_tensor.view(-1).view(torch.uint8)
    parts = list(as_bytes.chunk(dist.get_world_size(group)))
    dist.all_gather(parts, input_tensor.contiguous().view(-1).view(torch.uint8), group)
    return Done() if async_op else None


class Done:
    """The handle of an operation that is over."""

    def wait(self) -> None:
        """Returns at once."""


@contextmanager
def one_by_one(*args: Any, **kwargs: Any) -> Iterator[Done]:
    """Runs each collective of the block as it is called, instead of all of them at its end."""
    yield Done()


def install() -> None:
    """Puts the stand-in in place for this process where torch needs it; before Megatron-Core is imported."""
    if TORCH < (2, 3):
        names: Any = dist
        names.all_reduce = all_reduce
        names.reduce_scatter_tensor = names._reduce_scatter_base = reduce_scatter_tensor
        names.all_gather_into_tensor = names._all_gather_base = all_gather_into_tensor
        names._coalescing_manager = one_by_one
