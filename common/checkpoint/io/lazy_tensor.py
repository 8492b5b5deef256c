"""A tensor that is known before it is made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.checkpoint.io.disk import BLOCK_BYTES, empty, load
from common.errors import KitError

# Tensors, or views of mapped files, that lie side by side (joined along the last dimension).
Beside = Sequence[Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype, made of `parts` a few rows at a time when it is written.

    `parts` gives what lies one below the other in it, cast to its dtype when it is made. Making it raises KitError
    where the cast would make a value infinite.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Beside]]
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
        """Its data in row-major order, read and made as it is asked for, some megabytes at a time."""
        size = 0
        for beside in self.parts():
            for rows in in_rows(beside):
                block = tensor_bytes(_joined([load(part) for part in rows], self.dtype, self.name))
                size += block.nbytes
                if block.nbytes:
                    yield block
        assert size == self.num_bytes, (size, self)

    def produce(self) -> Tensor:
        """All of it, made now."""
        data = bytearray().join(self.blocks())
        made = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return made.reshape(self.shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one shape and dtype and agree to the last bit, read a block at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = ([np.frombuffer(tensor_bytes(load(part)), np.uint8) for part in rows] for rows in in_rows([one, other]))
    return all(np.array_equal(mine, its) for mine, its in pairs)


def _joined(parts: Beside, dtype: torch.dtype, name: str) -> Tensor:
    """`parts` side by side in row-major order; no copy where there is one, which lies so already."""
    if len(parts) == 1 and parts[0].is_contiguous() and parts[0].dtype == dtype:
        return parts[0]
    widths = [part.shape[-1] for part in parts]
    joined = empty((*parts[0].shape[:-1], sum(widths)), dtype)
    for part, place in zip(parts, joined.split(widths, dim=-1), strict=True):
        place.copy_(part)
        if part.dtype != dtype:
            _check_cast(part, place, name)
    return joined


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.numel():
        return True
    if tensor.dtype == torch.float16:  # which torch 2.1 has no aminmax for on the CPU
        return bool(torch.isfinite(tensor).all())
    return all(torch.isfinite(end) for end in torch.aminmax(tensor))  # passes NaN on, and is far faster


def _check_cast(before: Tensor, after: Tensor, name: str) -> None:
    """Raises KitError where a value became infinite."""
    if all_finite(after):
        return
    beyond = before[torch.isinf(after) & torch.isfinite(before)]
    if beyond.numel():
        kind = str(after.dtype).removeprefix("torch.")
        raise KitError(
            f"{name} holds {beyond[0].item():g}, and {kind} ends at {torch.finfo(after.dtype).max:g}: it would become"
            " infinite; set DTYPE to bf16 or fp32, or leave it empty"
        )


def in_rows(beside: Beside) -> Iterator[Beside]:
    """The same a few rows at a time: of all that lies between the first and the last element, a block."""
    beside = [part if part.dim() else part.reshape(1) for part in beside]
    row_bytes = sum(part.stride(0) * part.element_size() for part in beside)
    rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, beside[0].shape[0], rows):
        yield [part[start : start + rows] for part in beside]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order; no copy where it lies so already."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
