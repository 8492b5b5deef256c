"""A tensor that is known before it is made."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype that `produce` makes when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.numel * self.dtype.itemsize

    def bytes(self) -> memoryview:
        """Its data, made now."""
        tensor = self.produce()
        assert tuple(tensor.shape) == self.shape and tensor.dtype == self.dtype, (tensor.shape, tensor.dtype, self)
        return tensor_bytes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order; no copy where it lies so already."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
