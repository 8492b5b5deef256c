"""Megatron-Core's torch_dist format, read and written without Megatron-Core.

`.metadata` is a pickled torch.distributed.checkpoint Metadata: each tensor's global shape and chunks, and for each
chunk its file, offset and length. There lies what torch.save writes for the chunk. Layers of one kind are stacked: the
tensor `decoder.layers.mlp.linear_fc2.weight` is [layers, h, f]; some writers number them instead.
Source: megatron/core/dist_checkpointing/strategies/torch.py and torch/distributed/checkpoint/filesystem.py.
"""

import gc
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from common.checkpoint.archive import ALIGNMENT, ArchiveWriter, MappedFile, of_size, write_archive
from common.checkpoint.disk import Writer, ahead
from common.checkpoint.lazy import LazyTensor
from common.checkpoint.unpickle import RestrictedUnpickler
from common.errors import KitError

DATA_FILE = "__0_0.distcp"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON = {"common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class StoredChunk:
    """One stored block of a tensor: where it lies in the tensor, and in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


class DistReader:
    """The tensors of a torch_dist checkpoint by their keys; raises KitError when it is damaged or incomplete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tensors = self._stored_tensors(load_metadata(path / ".metadata", foreign=True))
        except KitError:
            raise
        except Exception as error:  # pickle lets out whatever its objects raise
            raise KitError(f"{path / '.metadata'} cannot be read ({error!r}): copy the checkpoint again") from error
        self._file = cache(lambda name: MappedFile(path / name))

    def _stored_tensors(self, metadata: dcp.Metadata) -> dict[str, StoredTensor]:
        where = {(index.fqn, _tuple(index.offset)): info for index, info in metadata.storage_data.items()}
        entries = metadata.state_dict_metadata.items()
        return {
            key: self._stored(key, entry, where)
            for key, entry in entries
            if isinstance(entry, dcp.TensorStorageMetadata)
        }

    def _stored(self, key: str, entry: dcp.TensorStorageMetadata, where: dict[Any, Any]) -> StoredTensor:
        chunks = []
        for chunk in entry.chunks:
            info = where.get((key, _tuple(chunk.offsets)))
            if info is None:
                raise KitError(
                    f"{self.path}: .metadata tells no place for {key} at {list(chunk.offsets)}: copy it again"
                )
            place = (info.relative_path, info.offset, info.length)
            chunks.append(StoredChunk(_tuple(chunk.offsets), _tuple(chunk.sizes), *place))
        return StoredTensor(_tuple(entry.size), entry.properties.dtype, tuple(chunks))

    def _part(self, stored: StoredTensor, chunk: StoredChunk, layer: int | None) -> Tensor:
        """The stored block itself, or the layer of it."""
        value = self._file(chunk.file).read(chunk.start, chunk.length)
        if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != (chunk.sizes, stored.dtype):
            raise KitError(f"{self.path / chunk.file}: what lies at byte {chunk.start} is not the block of .metadata")
        return value if layer is None else value[layer - chunk.offsets[0]]

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """The whole tensor `key`, or the part of a stacked one that is `layer`'s.

        No copy where one block is all of it. Raises KitError when blocks are missing.
        """
        stored = self.tensors[key]
        shape = stored.shape if layer is None else stored.shape[1:]
        blocks = [chunk for chunk in stored.chunks if layer is None or _holds(chunk, layer)]
        if len(blocks) == 1 and (blocks[0].sizes if layer is None else blocks[0].sizes[1:]) == shape:
            return self._part(stored, blocks[0], layer)
        sizes = [torch.Size(block.sizes if layer is None else block.sizes[1:]) for block in blocks]
        filled, numel = sum(size.numel() for size in sizes), torch.Size(shape).numel()
        if filled != numel:
            raise KitError(f"{self.path}: {key} has {filled} of {numel} elements: the checkpoint is not whole")
        whole = torch.empty(shape, dtype=stored.dtype)
        for block in blocks:
            part = self._part(stored, block, layer)
            at = block.offsets if layer is None else block.offsets[1:]
            whole[tuple(slice(start, start + size) for start, size in zip(at, part.shape, strict=True))] = part
        return whole


def _holds(chunk: StoredChunk, layer: int) -> bool:
    return chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]


def _tuple(size: Any) -> tuple[int, ...]:
    return tuple(size) if size is not None else ()


def load_metadata(path: Path, *, foreign: bool = False) -> dcp.Metadata:
    """What the file `.metadata` holds; raises KitError where it is damaged or could run code.

    `foreign`: names of others' classes are let pass, as for RestrictedUnpickler.
    """
    collects = gc.isenabled()
    gc.disable()  # which would look again and again through millions of objects, none of which is free: a quarter more
    try:
        metadata = RestrictedUnpickler(path.read_bytes(), path, foreign=foreign).load()
    except KitError:
        raise
    except Exception as error:  # pickle lets out whatever its objects raise
        raise KitError(f"{path} cannot be read ({error!r}): copy the checkpoint again") from error
    finally:
        if collects:
            gc.enable()
    if not isinstance(metadata, dcp.Metadata) or getattr(metadata, "storage_data", None) is None:
        raise KitError(f"{path} holds no metadata of torch.distributed.checkpoint: the checkpoint is not whole")
    return metadata


@dataclass(frozen=True)
class Block:
    """A block to be written: its place in the global tensor, [1, ...] at a layer for stacked ones."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: LazyTensor


def write_dist(path: Path, blocks: Iterable[Block], common: dict[str, Any], done: Callable[[int], None]) -> None:
    """Writes `blocks` as one data file, with metadata.json, common.pt and .metadata; `done` is told bytes as they go.

    `common` must hold plain values only: Megatron-Core loads it with torch.load's `weights_only`.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    blocks = list(blocks)
    data = ahead(data for block in blocks for data in block.tensor.blocks())
    with Writer(path / DATA_FILE) as stream:
        position = 0
        for block in blocks:
            padding = -position % ALIGNMENT  # so that a mapped block can be used where it lies
            stream.write(bytes(padding))
            archive = ArchiveWriter(stream, block.tensor)
            archive.write(of_size(data, block.tensor.num_bytes))
            done(block.tensor.num_bytes)
            length = archive.close()
            _note(tensors, storage, block, position + padding, length)
            position += padding + length
    with Writer(path / "common.pt") as stream:
        write_archive(stream, common)
    (path / "metadata.json").write_text(json.dumps(BACKEND | COMMON))
    # The last: without it the folder is no checkpoint.
    (path / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(tensors, None, storage)))


def _note(
    tensors: dict[str, Any],
    storage: dict[dcp.MetadataIndex, _StorageInfo],
    block: Block,
    position: int,
    length: int,
) -> None:
    """Adds a written block to the metadata."""
    offsets = torch.Size(block.offsets)
    if block.key not in tensors:
        properties = dcp.TensorProperties(dtype=block.tensor.dtype)
        tensors[block.key] = dcp.TensorStorageMetadata(properties, torch.Size(block.global_shape), [])
    tensors[block.key].chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size(block.tensor.shape)))
    storage[dcp.MetadataIndex(block.key, offsets)] = _StorageInfo(DATA_FILE, position, length)
