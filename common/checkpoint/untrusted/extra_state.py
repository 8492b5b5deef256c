"""Transformer Engine's `_extra_state` (FP8 scales): a tensor or BytesIO with a pickle that it loads itself.

The tensor holds pickle.dumps output (its tensors are bytes objects in torch.save's legacy format), the BytesIO
torch.save output. Source: transformer_engine/pytorch/module/base.py, get_extra_state and set_extra_state.
"""

import io
from pathlib import Path
from typing import Any

from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.pickled_tensors import PickledStorage, TensorStub, storage_of
from common.checkpoint.untrusted.placeholders import Global, InertBytesIO, require
from common.checkpoint.untrusted.restricted_unpickler import RestrictedUnpickler
from common.errors import KitError


def check_extra_state(value: Any, archive: ArchiveReader) -> None:
    """Raises KitError when the `_extra_state` of `archive`, loaded with stubs, could run code.

    In Megatron-Core's torch_dist it is the only element of a list.
    """
    try:
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, TensorStub):
                _check_tensor(one, archive)
            elif isinstance(one, InertBytesIO) and one.state and one.state[0]:
                _check_torch_save(one.state[0], archive.source)
    except KitError:
        raise
    except Exception as error:  # unpickling raises whatever its objects raise
        raise KitError(f"{archive.source} has a damaged _extra_state ({error!r}): copy it again") from error


def _check_tensor(tensor: TensorStub, archive: ArchiveReader) -> None:
    """Checks a tensor of any dtype: Transformer Engine uses its bytes."""
    require(len(tensor.size) == 1 and tensor.stride == (1,))
    start, end = (index * tensor.dtype.itemsize for index in (tensor.offset, tensor.offset + tensor.size[0]))
    if start < end:
        _StateUnpickler(archive.data(f"data/{tensor.storage.key}")[start:end], archive.source).load()


# What pickle writes for a storage: torch's function, or the one with which Megatron-Core 0.19 replaces it.
_STORAGE_LOADERS = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}


class _StateUnpickler(RestrictedUnpickler):
    """Allows the storages that plain pickle writes, without torch.save."""

    def find_class(self, module: str, name: str) -> Any:
        """As the base class, and the functions that load a storage."""
        if (module, name) in _STORAGE_LOADERS:
            return Global(module, name, lambda data: _check_torch_save(data, self.source))
        return super().find_class(module, name)


class _LegacyUnpickler(RestrictedUnpickler):
    """For torch.save's legacy format, where storages follow the pickle."""

    def __init__(self, data: io.BytesIO, source: Path) -> None:
        super().__init__(data, source)
        self.storages: dict[str, PickledStorage] = {}

    def persistent_load(self, pid: Any) -> PickledStorage:
        """The storage that `pid` references."""
        require(pid[5] is None)  # not a view of another storage
        storage = storage_of(pid, parts=6)
        return self.storages.setdefault(storage.key, storage)


def _check_torch_save(data: Any, source: Path) -> Any:
    """The object that torch.save wrote to `data`, with stubs for tensors; raises ValueError or KitError."""
    require(type(data) is bytes)
    if data[:4] == b"PK\3\4":
        return ArchiveReader(lambda start, size: data[start : start + size], len(data), source).load()
    stream = io.BytesIO(data)
    magic, version, _ = (RestrictedUnpickler(stream, source).load() for _ in range(3))  # third: system information
    require(type(magic) is int and (magic, version) == (MAGIC_NUMBER, PROTOCOL_VERSION))
    unpickler = _LegacyUnpickler(stream, source)
    value, keys = unpickler.load(), RestrictedUnpickler(stream, source).load()
    require(type(keys) is list)
    require(sum(storage.num_bytes for storage in unpickler.storages.values()) <= len(data))
    return value
