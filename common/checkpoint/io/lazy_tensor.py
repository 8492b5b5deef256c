"""Tensors of known shape and dtype whose data is produced when it is written, and block-wise work on tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.checkpoint.io.direct_io import BLOCK_BYTES, empty
from common.checkpoint.io.mapped_file import load
from common.errors import KitError

# Tensors, or views of mapped files, to be concatenated along the last dimension.
Columns = Sequence[Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype; its data is produced from `parts` when it is written, some rows at a time.

    `parts` returns what to concatenate along the first dimension; it is cast to `dtype`. Producing the data raises
    KitError where the cast would make a value infinite.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Columns]]
    name: str = ""  # for messages

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.numel * self.dtype.itemsize

    def blocks(self) -> Iterator[memoryview]:
        """Its data in row-major order, in blocks of some megabytes that are produced on demand."""
        size = 0
        for columns in self.parts():
            for rows in row_blocks(columns):
                block = tensor_bytes(_concatenate([load(part) for part in rows], self.dtype, self.name))
                size += block.nbytes
                if block.nbytes:
                    yield block
        assert size == self.num_bytes, (size, self)

    def materialize(self) -> Tensor:
        """The whole tensor."""
        data = bytearray().join(self.blocks())
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.reshape(self.shape)


def bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits, compared a block at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = ([np.frombuffer(tensor_bytes(load(part)), np.uint8) for part in rows] for rows in row_blocks([one, other]))
    return all(np.array_equal(left, right) for left, right in pairs)


def _concatenate(parts: Columns, dtype: torch.dtype, name: str) -> Tensor:
    """`parts` concatenated along the last dimension; a single contiguous part is not copied."""
    if len(parts) == 1 and parts[0].is_contiguous() and parts[0].dtype == dtype:
        return parts[0]
    widths = [part.shape[-1] for part in parts]
    whole = empty((*parts[0].shape[:-1], sum(widths)), dtype)
    for part, target in zip(parts, whole.split(widths, dim=-1), strict=True):
        target.copy_(part)
        if part.dtype != dtype:
            _check_cast(part, target, name)
    return whole


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.numel():
        return True
    if tensor.dtype == torch.float16:  # torch 2.1 has no aminmax for it on the CPU
        return bool(torch.isfinite(tensor).all())
    return all(torch.isfinite(end) for end in torch.aminmax(tensor))  # propagates NaN, and is far faster


def _check_cast(before: Tensor, after: Tensor, name: str) -> None:
    """Raises KitError where a value became infinite."""
    if all_finite(after):
        return
    overflowed = before[torch.isinf(after) & torch.isfinite(before)]
    if overflowed.numel():
        dtype = str(after.dtype).removeprefix("torch.")
        raise KitError(
            f"{name} holds {overflowed[0].item():g}, which overflows {dtype} (largest value"
            f" {torch.finfo(after.dtype).max:g}): set DTYPE to bf16 or fp32, or leave it empty"
        )


def row_blocks(columns: Columns) -> Iterator[Columns]:
    """`columns`, some rows at a time: from the first to the last element each yields up to one block."""
    columns = [part if part.dim() else part.reshape(1) for part in columns]
    row_bytes = sum(part.stride(0) * part.element_size() for part in columns)
    num_rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, columns[0].shape[0], num_rows):
        yield [part[start : start + num_rows] for part in columns]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order; a contiguous tensor is not copied."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
