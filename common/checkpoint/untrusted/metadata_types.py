"""Type check of an unpickled `.metadata`: a file may hold anything, and torch's dataclasses do not check their fields.

By hand, because the objects are already made, some without all of their fields: pydantic would make each one anew.
"""

from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from common.checkpoint.untrusted.placeholders import is_size_int


def metadata_type_error(metadata: dcp.Metadata) -> str:
    """What of `metadata` has not the type that torch.distributed.checkpoint writes; empty where all has."""
    if type(metadata.storage_data) is not dict:
        return "has an invalid storage_data"
    if not all(map(_is_storage_entry, metadata.storage_data.items())):
        return "has an invalid entry in storage_data"
    entries = getattr(metadata, "state_dict_metadata", None)
    if type(entries) is not dict or not all(type(key) is str for key in entries):
        return "has an invalid state_dict_metadata"
    for key, entry in entries.items():
        if isinstance(entry, dcp.TensorStorageMetadata) and not _is_tensor_metadata(vars(entry)):
            return f"has invalid tensor metadata for {key[:200]!r}"
    return ""


def _is_storage_entry(item: tuple[Any, Any]) -> bool:
    index, info = item
    if type(index) is not dcp.MetadataIndex or type(vars(index).get("fqn")) is not str:
        return False
    fields = vars(info) if hasattr(info, "__dict__") else {}
    return type(fields.get("relative_path")) is str and all(is_size_int(fields.get(x)) for x in ("offset", "length"))


def _is_tensor_metadata(fields: dict[str, Any]) -> bool:
    size: Any
    size, chunks, properties = (fields.get(name) for name in ("size", "chunks", "properties"))
    if not _is_size(size) or type(chunks) is not list or type(properties) is not dcp.TensorProperties:
        return False
    return type(vars(properties).get("dtype")) is torch.dtype and all(_is_chunk(chunk, len(size)) for chunk in chunks)


def _is_chunk(chunk: Any, num_dims: int) -> bool:
    fields: dict[str, Any] = vars(chunk) if type(chunk) is dcp.ChunkStorageMetadata else {}
    sizes: list[Any] = [fields.get("offsets"), fields.get("sizes")]
    return all(_is_size(size) and len(size) == num_dims for size in sizes)


def _is_size(size: Any) -> bool:
    return isinstance(size, tuple) and all(map(is_size_int, size))
