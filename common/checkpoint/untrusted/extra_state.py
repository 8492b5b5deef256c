"""Transformer Engine's `_extra_state` (FP8 scales): bytes in a tensor or a BytesIO, which it unpickles by itself.

A tensor holds what pickle.dumps gave (a pickle whose tensors are torch.save's old format, each in one bytes object), a
BytesIO what torch.save gave. Source: transformer_engine/pytorch/module/base.py, get_extra_state and set_extra_state.
"""

import io
from pathlib import Path
from typing import Any

from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.pickled_tensors import PickledStorage, TensorStub, storage_of
from common.checkpoint.untrusted.placeholders import Buffer, Global, require
from common.checkpoint.untrusted.restricted_unpickler import RestrictedUnpickler
from common.errors import KitError


def check_extra_state(value: Any, archive: ArchiveReader) -> None:
    """Raises KitError when the `_extra_state` of `archive`, loaded with stubs, holds what could run code.

    Megatron-Core's torch_dist keeps it as the only element of a list.
    """
    try:
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, TensorStub):
                _check_tensor(one, archive)
            elif isinstance(one, Buffer) and one.state and one.state[0]:
                _check_saved(one.state[0], archive.source)
    except KitError:
        raise
    except Exception as error:  # pickle lets out whatever its objects raise
        raise KitError(f"{archive.source} holds an _extra_state that is damaged ({error!r}): copy it again") from error


def _check_tensor(tensor: TensorStub, archive: ArchiveReader) -> None:
    """Of any dtype: Transformer Engine takes its bytes."""
    require(len(tensor.size) == 1 and tensor.stride == (1,))
    start, end = (place * tensor.dtype.itemsize for place in (tensor.offset, tensor.offset + tensor.size[0]))
    if start < end:
        _StateUnpickler(archive.data(f"data/{tensor.storage.key}")[start:end], archive.source).load()


class _StateUnpickler(RestrictedUnpickler):
    """Takes the storages that pickle writes where torch.save is not asked."""

    def find_class(self, module: str, name: str) -> Any:
        """The same, and a storage's own bytes."""
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return Global(module, name, lambda data: _check_saved(data, self.source))
        return super().find_class(module, name)


class _OldUnpickler(RestrictedUnpickler):
    """Of torch.save's old format, whose storages lie behind the pickle."""

    def __init__(self, data: io.BytesIO, source: Path) -> None:
        super().__init__(data, source)
        self.storages: dict[str, PickledStorage] = {}

    def persistent_load(self, pid: Any) -> PickledStorage:
        """The storage that `pid` names."""
        require(pid[5] is None)  # no view of another
        storage = storage_of(pid, parts=6)
        return self.storages.setdefault(storage.key, storage)


def _check_saved(data: Any, source: Path) -> Any:
    """What torch.save wrote to `data`, with stubs for tensors; raises ValueError or KitError."""
    require(type(data) is bytes)
    if data[:4] == b"PK\3\4":
        return ArchiveReader(lambda start, size: data[start : start + size], len(data), source).load()
    stream = io.BytesIO(data)
    magic, version, _ = (RestrictedUnpickler(stream, source).load() for _ in range(3))  # the third: the machine
    require(type(magic) is int and (magic, version) == (MAGIC_NUMBER, PROTOCOL_VERSION))
    unpickler = _OldUnpickler(stream, source)
    value, keys = unpickler.load(), RestrictedUnpickler(stream, source).load()
    require(type(keys) is list)
    require(sum(storage.num_bytes for storage in unpickler.storages.values()) <= len(data))
    return value
