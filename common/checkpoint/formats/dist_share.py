"""Megatron-Core's torch_dist format, written without it: a data file a rank, and what `.metadata` tells of them.

A file holds one archive of torch.save a block. Beside them lies checksums.json: of each file its size and CRC-32, which
`convert` looks at with all its data, and training with what it reads: the archives hold a CRC-32 of each block.
Source: _write_item and _StorageInfo in torch/distributed/checkpoint/filesystem.py.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from common.atomic_file import sync
from common.checkpoint.formats.archive import ALIGNMENT, ArchiveWriter, of_size, write_archive
from common.checkpoint.io.checksums import CHECKSUMS, Facts
from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.disk import Writer, ahead
from common.checkpoint.io.lazy import LazyTensor

DATA_FILE = "__0_0.distcp"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON = {"common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class Block:
    """A block to be written: its place in the global tensor, [1, ...] at a layer for stacked ones."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: LazyTensor


@dataclass(frozen=True)
class Written:
    """What lies in a file: a block, or, where `dtype` is None, an object."""

    key: str
    file: str
    start: int
    length: int
    dtype: torch.dtype | None = None
    global_shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Share:
    """What a rank wrote."""

    entries: tuple[Written, ...]
    files: Facts


def write_share(
    path: Path,
    blocks: Sequence[Block],
    objects: dict[str, bytes],
    data: Iterator[memoryview],
    done: Callable[[int], None] = lambda size: None,
) -> Share:
    """Writes the file `path`, all of which is on the disk when this returns; `done` is told bytes as they go.

    data: that of `blocks` in row-major order, one after the other. objects: what torch.save makes of them, by their
    keys. Raises OSError when the disk refuses.
    """
    entries: list[Written] = []
    with Writer(path, checked=True) as stream:
        position = 0
        for block in blocks:
            padding = -position % ALIGNMENT  # so that a mapped block can be used where it lies
            stream.write(bytes(padding))
            position += padding
            archive = ArchiveWriter(stream, block.tensor)
            archive.write(of_size(data, block.tensor.num_bytes))
            length = archive.close()
            shapes = (block.tensor.dtype, block.global_shape, block.offsets, block.tensor.shape)
            entries.append(Written(block.key, path.name, position, length, *shapes))
            position += length
            done(block.tensor.num_bytes)
        for key, value in objects.items():
            stream.write(value)
            entries.append(Written(key, path.name, position, len(value)))
            position += len(value)
    return Share(tuple(entries), {path.name: stream.facts})


def metadata_of(shares: Iterable[Share]) -> dcp.Metadata:
    """What `.metadata` holds for all of them."""
    tensors: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for entry in (entry for share in shares for entry in share.entries):
        place = _StorageInfo(entry.file, entry.start, entry.length)
        if entry.dtype is None:
            tensors[entry.key] = dcp.BytesStorageMetadata()
            storage[dcp.MetadataIndex(entry.key)] = place
            continue
        offsets = torch.Size(entry.offsets)
        if entry.key not in tensors:
            properties = dcp.TensorProperties(dtype=entry.dtype)
            tensors[entry.key] = dcp.TensorStorageMetadata(properties, torch.Size(entry.global_shape), [])
        tensors[entry.key].chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size(entry.sizes)))
        storage[dcp.MetadataIndex(entry.key, offsets)] = place
    return dcp.Metadata(tensors, None, storage)


def write_rest(folder: Path, shares: Sequence[Share], common: dict[str, Any]) -> None:
    """Writes what makes `shares` a checkpoint: common.pt, metadata.json, checksums.json, and `.metadata` last.

    `common` must hold plain values only: Megatron-Core loads it with torch.load's `weights_only`. Raises OSError.
    """
    files = {name: facts for share in shares for name, facts in share.files.items()}
    with Writer(folder / "common.pt", checked=True) as stream:
        write_archive(stream, common)
    files["common.pt"] = stream.facts
    rest = {
        "metadata.json": json.dumps(BACKEND | COMMON).encode(),
        ".metadata": pickle.dumps(metadata_of(shares)),  # without it the folder is no checkpoint
    }
    files |= {name: {"bytes": len(content), "crc32": crc32(content)} for name, content in rest.items()}
    for name, content in {CHECKSUMS: json.dumps(files).encode(), **rest}.items():
        with (folder / name).open("wb") as file:
            file.write(content)
        sync(folder / name)
    sync(folder)  # the names of all files


def write_dist(path: Path, blocks: Iterable[Block], common: dict[str, Any], done: Callable[[int], None]) -> None:
    """Writes `blocks` as a checkpoint of one data file; `done` is told bytes as they go."""
    path.mkdir(parents=True, exist_ok=True)
    blocks = list(blocks)
    data = ahead(part for block in blocks for part in block.tensor.blocks())
    write_rest(path, [write_share(path / DATA_FILE, blocks, {}, data, done)], common)
