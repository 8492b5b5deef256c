"""Type check of an unpickled `.metadata`: a file may hold anything, and torch's dataclasses do not check their fields.

By hand, because the objects are already made, some without all of their fields: pydantic would make each one anew.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from common.checkpoint.untrusted.placeholders import is_size_int

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


@cache
def _dcp() -> Any:
    """torch's module; imported where a checkpoint is read, since that takes as long as importing torch."""
    from torch.distributed.checkpoint import metadata

    return metadata


def is_metadata(value: Any) -> "TypeGuard[Metadata]":
    """Whether it is what a `.metadata` file holds, with the place of each entry."""
    return isinstance(value, _dcp().Metadata) and getattr(value, "storage_data", None) is not None


def is_tensor(entry: Any) -> "TypeGuard[TensorStorageMetadata]":
    """Whether an entry of `state_dict_metadata` is a tensor's."""
    return isinstance(entry, _dcp().TensorStorageMetadata)


def is_object(entry: Any) -> bool:
    """Whether an entry of `state_dict_metadata` is that of another object."""
    return isinstance(entry, _dcp().BytesStorageMetadata)


def metadata_type_error(metadata: "Metadata") -> str:
    """What of `metadata` has not the type that torch.distributed.checkpoint writes; empty where all has."""
    if type(metadata.storage_data) is not dict:
        return "has an invalid storage_data"
    if not all(map(_is_storage_entry, metadata.storage_data.items())):
        return "has an invalid entry in storage_data"
    entries = getattr(metadata, "state_dict_metadata", None)
    if type(entries) is not dict or not all(type(key) is str for key in entries):
        return "has an invalid state_dict_metadata"
    for key, entry in entries.items():
        if is_tensor(entry) and not _is_tensor_metadata(vars(entry)):
            return f"has invalid tensor metadata for {key[:200]!r}"
    return ""


def _is_storage_entry(item: tuple[Any, Any]) -> bool:
    index, info = item
    if type(index) is not _dcp().MetadataIndex or type(vars(index).get("fqn")) is not str:
        return False
    fields = vars(info) if hasattr(info, "__dict__") else {}
    return type(fields.get("relative_path")) is str and all(is_size_int(fields.get(x)) for x in ("offset", "length"))


def _is_tensor_metadata(fields: dict[str, Any]) -> bool:
    size: Any
    size, chunks, properties = (fields.get(name) for name in ("size", "chunks", "properties"))
    if not _is_size(size) or type(chunks) is not list or type(properties) is not _dcp().TensorProperties:
        return False
    return type(vars(properties).get("dtype")) is torch.dtype and all(_is_chunk(chunk, len(size)) for chunk in chunks)


def _is_chunk(chunk: Any, num_dims: int) -> bool:
    fields: dict[str, Any] = vars(chunk) if type(chunk) is _dcp().ChunkStorageMetadata else {}
    sizes: list[Any] = [fields.get("offsets"), fields.get("sizes")]
    return all(_is_size(size) and len(size) == num_dims for size in sizes)


def _is_size(size: Any) -> bool:
    return isinstance(size, tuple) and all(map(is_size_int, size))
