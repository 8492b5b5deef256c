"""Megatron-Core's torch_dist format, written without it: one .distcp file per rank, and the `.metadata` of all.

A .distcp file holds one torch.save archive per chunk. checksums.json beside it holds the size and CRC-32 of each file,
which `convert` checks with all data; training checks what it reads against the CRC-32 in the archives.
Source: _write_item and _StorageInfo in torch/distributed/checkpoint/filesystem.py.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.checkpoint.formats.torch_archive import ALIGNMENT, ArchiveWriter, take_bytes, write_archive
from common.checkpoint.io.checksums import CHECKSUMS, Checksums
from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.direct_io import prefetch
from common.checkpoint.io.file_writer import FileWriter
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.files import sync, write_synced

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

DATA_FILE = "__0_0.distcp"
SHARDED_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_BACKEND = {"common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class TensorShard:
    """A shard to write and its place in the global tensor, as in Megatron-Core's ShardedTensor.

    Of a tensor with stacked layers a shard is one layer, [1, ...].
    """

    key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    tensor: LazyTensor


@dataclass(frozen=True)
class WriteResult:
    """Where a shard, or an object (`dtype` None), was written."""

    key: str
    file: str
    offset: int
    length: int
    dtype: torch.dtype | None = None
    global_shape: tuple[int, ...] = ()
    global_offset: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class RankWriteResults:
    """What one rank wrote."""

    results: tuple[WriteResult, ...]
    checksums: Checksums


def write_data_file(
    path: Path,
    shards: Sequence[TensorShard],
    objects: dict[str, bytes],
    data: Iterator[memoryview],
    on_bytes: Callable[[int], None] = lambda size: None,
) -> RankWriteResults:
    """Writes a rank's .distcp file and syncs it; `on_bytes` is called with the number of bytes as they are written.

    data: of all `shards`, one after the other, in row-major order. objects: torch.save's bytes by key. Raises OSError
    when the disk refuses.
    """
    results: list[WriteResult] = []
    with FileWriter(path, checksum=True) as stream:
        position = 0
        for shard in shards:
            padding = -position % ALIGNMENT  # so that a mapped tensor can be used in place
            stream.write(bytes(padding))
            position += padding
            archive = ArchiveWriter(stream, shard.tensor)
            archive.write(take_bytes(data, shard.tensor.num_bytes))
            length = archive.close()
            shapes = (shard.tensor.dtype, shard.global_shape, shard.global_offset, shard.tensor.shape)
            results.append(WriteResult(shard.key, path.name, position, length, *shapes))
            position += length
            on_bytes(shard.tensor.num_bytes)
        for key, value in objects.items():
            stream.write(value)
            results.append(WriteResult(key, path.name, position, len(value)))
            position += len(value)
    return RankWriteResults(tuple(results), {path.name: stream.checksums})


def build_metadata(ranks: Iterable[RankWriteResults]) -> "Metadata":
    """The content of `.metadata` for what all ranks wrote."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for result in (result for rank in ranks for result in rank.results):
        info = _StorageInfo(result.file, result.offset, result.length)
        if result.dtype is None:
            tensors[result.key] = dcp.BytesStorageMetadata()
            storage[dcp.MetadataIndex(result.key)] = info
            continue
        offsets = torch.Size(result.global_offset)
        if result.key not in tensors:
            properties = dcp.TensorProperties(dtype=result.dtype)
            tensors[result.key] = dcp.TensorStorageMetadata(properties, torch.Size(result.global_shape), [])
        tensors[result.key].chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size(result.sizes)))
        storage[dcp.MetadataIndex(result.key, offsets)] = info
    return dcp.Metadata(tensors, None, storage)


def finish_checkpoint(folder: Path, ranks: Sequence[RankWriteResults], common: dict[str, Any]) -> None:
    """Completes a checkpoint whose data files are written: common.pt, metadata.json, checksums.json, then `.metadata`.

    `common`, the common state, may hold plain values only: Megatron-Core loads it with torch.load's `weights_only`.
    Raises OSError.
    """
    checksums = {name: entry for rank in ranks for name, entry in rank.checksums.items()}
    with FileWriter(folder / "common.pt", checksum=True) as stream:
        write_archive(stream, common)
    checksums["common.pt"] = stream.checksums
    rest = {
        "metadata.json": json.dumps(SHARDED_BACKEND | COMMON_BACKEND).encode(),
        ".metadata": pickle.dumps(build_metadata(ranks)),  # without it the folder is not a checkpoint
    }
    checksums |= {name: {"bytes": len(content), "crc32": crc32(content)} for name, content in rest.items()}
    for name, content in {CHECKSUMS: json.dumps(checksums).encode(), **rest}.items():
        write_synced(folder / name, content)
    sync(folder)  # the directory entries


def write_torch_dist(
    path: Path, shards: Iterable[TensorShard], common: dict[str, Any], on_bytes: Callable[[int], None]
) -> None:
    """Writes a checkpoint with one data file; `on_bytes` is called with the number of bytes as they are written."""
    path.mkdir(parents=True, exist_ok=True)
    shards = list(shards)
    data = prefetch(block for shard in shards for block in shard.tensor.blocks())
    finish_checkpoint(path, [write_data_file(path / DATA_FILE, shards, {}, data, on_bytes)], common)
