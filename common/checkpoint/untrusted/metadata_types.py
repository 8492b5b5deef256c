"""Whether the fields of an unpickled `.metadata` are of the types that torch writes: a file may hold anything."""

from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from common.checkpoint.untrusted.placeholders import is_count


def fault_of_types(metadata: dcp.Metadata) -> str:
    """What of `metadata` is not as torch.distributed.checkpoint writes it; empty where all is."""
    if type(metadata.storage_data) is not dict:
        return "does not tell where its tensors are"
    if not all(map(_is_place, metadata.storage_data.items())):
        return "does not tell where each tensor is"
    entries = getattr(metadata, "state_dict_metadata", None)
    if type(entries) is not dict or not all(type(key) is str for key in entries):
        return "does not name its tensors"
    for key, entry in entries.items():
        if isinstance(entry, dcp.TensorStorageMetadata) and not _is_tensor(vars(entry)):
            return f"does not tell what {key[:200]!r} is"
    return ""


def _is_place(item: tuple[Any, Any]) -> bool:
    index, info = item
    if type(index) is not dcp.MetadataIndex or type(vars(index).get("fqn")) is not str:
        return False
    told = vars(info) if hasattr(info, "__dict__") else {}
    return type(told.get("relative_path")) is str and is_count(told.get("offset")) and is_count(told.get("length"))


def _is_tensor(told: dict[str, Any]) -> bool:
    size: Any
    size, chunks, properties = (told.get(name) for name in ("size", "chunks", "properties"))
    if not _is_size(size) or type(chunks) is not list or type(properties) is not dcp.TensorProperties:
        return False
    return type(vars(properties).get("dtype")) is torch.dtype and all(_is_chunk(chunk, len(size)) for chunk in chunks)


def _is_chunk(chunk: Any, dimensions: int) -> bool:
    told: dict[str, Any] = vars(chunk) if type(chunk) is dcp.ChunkStorageMetadata else {}
    places: list[Any] = [told.get("offsets"), told.get("sizes")]
    return all(_is_size(one) and len(one) == dimensions for one in places)


def _is_size(size: Any) -> bool:
    return isinstance(size, tuple) and all(map(is_count, size))
