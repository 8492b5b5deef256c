"""Rebuilds pickled tensors, checking that each lies within its storage.

torch takes the size of a storage from the pickle and does not compare it with the record.
"""

import collections
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from common.checkpoint.untrusted.placeholders import SCALARS, Global, is_size_int, require

_STORAGE_DTYPES = torch.storage._storage_type_to_dtype_map()
STORAGES = ("UntypedStorage", *_STORAGE_DTYPES)
MAX_DIMENSIONS = 64  # torch's own limit
_LOCATION = re.compile(r"cpu|meta|(cuda|musa|npu|xpu)(:\d+)?")


@dataclass(frozen=True)
class PickledStorage:
    """A storage that a pickle references."""

    key: str
    dtype: torch.dtype
    num_bytes: int
    load: Callable[[], Any] | None = None  # None: only stubs are made


@dataclass(frozen=True)
class TensorStub:
    """Placeholder for a tensor whose storage is not read."""

    storage: PickledStorage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def storage_of(pid: Any, *, parts: int) -> PickledStorage:
    """The storage that a persistent id with `parts` items references; raises ValueError for any other id."""
    require(type(pid) is tuple and len(pid) == parts and pid[0] == "storage")
    kind, key, location, count = pid[1:5]
    require(type(kind) is Global and kind.name in STORAGES and type(key) is str)
    require(type(location) is str and _LOCATION.fullmatch(location) is not None)
    require(is_size_int(count))
    dtype = _STORAGE_DTYPES.get(kind.name, torch.uint8)
    return PickledStorage(key, dtype, count * dtype.itemsize)


def _check(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any) -> None:
    """Raises ValueError unless the tensor lies within its storage and is not larger."""
    require(type(storage) is PickledStorage and type(dtype) is torch.dtype and type(requires_grad) is bool)
    require(type(size) in (tuple, torch.Size) and type(stride) in (tuple, torch.Size) and len(size) == len(stride))
    require(len(size) <= MAX_DIMENSIONS)
    require(all(is_size_int(number) for number in (offset, *size, *stride)))
    require(hooks is None or type(hooks) is collections.OrderedDict and not hooks)
    numel = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if numel else -1
    require(max(numel, last + 1) * dtype.itemsize <= storage.num_bytes)


def _hooks() -> Any:
    return collections.OrderedDict()


def _rebuild_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Any:
    dtype: Any = getattr(storage, "dtype", None)
    _check(storage, offset, size, stride, requires_grad, hooks, dtype)
    require(not metadata)
    if storage.load is None:
        return TensorStub(storage, dtype, offset, size, stride)
    return torch._utils._rebuild_tensor_v2(storage.load(), offset, size, stride, requires_grad, _hooks())


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any) -> Any:
    return _rebuild_v2(storage, offset, size, stride, False, None)


def _rebuild_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    _check(storage, offset, size, stride, requires_grad, hooks, dtype)
    require(not metadata)
    if storage.load is None:
        return TensorStub(storage, dtype, offset, size, stride)
    return torch._utils._rebuild_tensor_v3(storage.load(), offset, size, stride, requires_grad, _hooks(), dtype)


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    require(isinstance(data, (torch.Tensor, TensorStub)) and type(requires_grad) is bool and not hooks)
    return data if isinstance(data, TensorStub) else torch._utils._rebuild_parameter(data, requires_grad, _hooks())


def _rebuild_parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> Any:
    _check_attributes(state)
    return _rebuild_parameter(data, requires_grad, hooks)


def rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor without the attributes in `state`; `kind` is Tensor or Parameter."""
    _check_attributes(state)
    require(type(function) is Global and function.name in REBUILD and type(kind) is Global and kind.call is None)
    return REBUILD[function.name](*args)


def _check_attributes(state: Any) -> None:
    """Raises ValueError unless the attributes are scalars with public names."""
    require(type(state) is not tuple or len(state) == 2)
    for part in state if type(state) is tuple else (state,):
        require(part is None or type(part) is dict)
        for name, one in (part or {}).items():
            require(type(name) is str and name[:1] != "_" and type(one) in SCALARS)


REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild,
    "_rebuild_tensor_v2": _rebuild_v2,
    "_rebuild_tensor_v3": _rebuild_v3,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter_with_state,
}
