"""Megatron-Core's torch_dist format, read without Megatron-Core.

`.metadata` is a pickled torch.distributed.checkpoint Metadata: each tensor's global shape and chunks, and for each
chunk its file, offset and length. There lies what torch.save writes for the chunk. Layers of one kind are stacked: the
tensor `decoder.layers.mlp.linear_fc2.weight` is [layers, h, f]; some writers number them instead.
Source: megatron/core/dist_checkpointing/strategies/torch.py and torch/distributed/checkpoint/filesystem.py.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from common.checkpoint.formats.archive import MappedFile
from common.checkpoint.io.checksums import check_inside, check_size, check_small_files, read_facts
from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.disk import load
from common.checkpoint.io.lazy import in_rows, tensor_bytes
from common.checkpoint.io.rectangles import Rectangle, fault_of_cover
from common.checkpoint.untrusted.metadata_types import fault_of_types
from common.checkpoint.untrusted.unpickle import RestrictedUnpickler
from common.errors import KitError


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
        self.path, facts = path, read_facts(path)
        check_small_files(path, facts)
        try:
            metadata = load_metadata(path / ".metadata", foreign=True)
            self.tensors = self._stored_tensors(metadata)
            where = {index.fqn: info for index, info in metadata.storage_data.items() if index.offset is None}
            entries = metadata.state_dict_metadata.items()
            for info in where.values():
                check_inside(path / ".metadata", str(info.relative_path))
            self.objects = {key: where[key] for key, entry in entries if isinstance(entry, dcp.BytesStorageMetadata)}
        except KitError:
            raise
        except Exception as error:  # pickle lets out whatever its objects raise
            raise KitError(f"{path / '.metadata'} cannot be read ({error!r}): copy the checkpoint again") from error

        def open_file(name: str) -> MappedFile:
            """The file, as long as when it was written."""
            file = MappedFile(path / name)
            check_size(path / name, file.size, facts)
            return file

        self._file = cache(open_file)

    def _stored_tensors(self, metadata: dcp.Metadata) -> dict[str, StoredTensor]:
        where = {(index.fqn, _tuple(index.offset)): info for index, info in metadata.storage_data.items()}
        entries = metadata.state_dict_metadata.items()
        return {
            key: self._stored(key, entry, where)
            for key, entry in entries
            if isinstance(entry, dcp.TensorStorageMetadata)
        }

    def _stored(self, key: str, entry: dcp.TensorStorageMetadata, where: dict[Any, Any]) -> StoredTensor:
        chunks, whole = [], Rectangle((0,) * len(entry.size), _tuple(entry.size))
        for chunk in entry.chunks:
            block = Rectangle(_tuple(chunk.offsets), _tuple(chunk.sizes))
            if not block.lies_in(whole):
                raise KitError(f"{self.path}: .metadata tells a block of {key} that is out of it: copy it again")
            info = where.get((key, _tuple(chunk.offsets)))
            if info is None:
                raise KitError(
                    f"{self.path}: .metadata tells no place for {key} at {list(chunk.offsets)}: copy it again"
                )
            check_inside(self.path / ".metadata", str(info.relative_path))
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

        No copy where one block is all of it. Raises KitError unless its blocks hold each element once.
        """
        stored = self.tensors[key]
        first = () if layer is None else (layer,)
        shape = stored.shape if layer is None else stored.shape[1:]
        wanted = Rectangle((*first, *(0,) * len(shape)), (*(1 for _ in first), *shape))
        common = self._common(key, wanted)
        if len(common) == 1 and common[0][2] == wanted and (layer is not None or common[0][1] == wanted):
            return self._part(stored, common[0][0], layer)
        whole = torch.empty(wanted.sizes, dtype=stored.dtype)
        for chunk, block, part in common:
            whole[part.within(wanted)] = self._part(stored, chunk, None)[part.within(block)]
        return whole.reshape(shape)

    def check_cover(self, key: str) -> None:
        """Raises KitError unless the blocks of `key` hold each of its elements once."""
        shape = self.tensors[key].shape
        self._common(key, Rectangle((0,) * len(shape), shape))

    def _common(self, key: str, wanted: Rectangle) -> list[tuple[StoredChunk, Rectangle, Rectangle]]:
        """Each stored block that has something of `wanted`, as a rectangle, and what it has.

        Raises KitError unless they have all of it, each element once.
        """
        chunks = ((chunk, Rectangle(chunk.offsets, chunk.sizes)) for chunk in self.tensors[key].chunks)
        common = [(chunk, block, part) for chunk, block in chunks if (part := block.common(wanted))]
        if fault := fault_of_cover(wanted, (part for _, _, part in common)):
            raise KitError(f"{self.path}: {key} {fault}: the checkpoint is not whole; copy it again")
        return common

    def blocks(self, key: str, wanted: Rectangle) -> Iterator[tuple[tuple[slice, ...], Tensor, "Checksum | None"]]:
        """What of the tensor `key` lies in `wanted`, some megabytes at a time: where in it, and the values there.

        With those of a block that is read whole comes its checksum, to be given each of them in their order. Raises
        KitError where blocks are missing.
        """
        stored = self.tensors[key]
        common = self._common(key, wanted)
        for chunk, block, part in sorted(common, key=lambda each: (each[0].file, each[0].start)):
            value, file = self._part(stored, chunk, None), self._file(chunk.file)
            whole = part == block and chunk.start in file.checksums
            checksum = Checksum(file.checksums[chunk.start], value.nbytes, file.path) if whole else None
            at = part.within(wanted)
            if not value.dim():
                yield at, value, None
                continue
            row = at[0].start
            for (rows,) in in_rows([value[part.within(block)]]):
                yield (slice(row, row + len(rows)), *at[1:]), load(rows), checksum
                row += len(rows)

    def object(self, key: str) -> Any:
        """What torch.save made the bytes `key` of; raises KitError where it is damaged or could run code."""
        place = self.objects[key]
        return self._file(place.relative_path).read(place.offset, place.length)


class Checksum:
    """The CRC-32 that the `num_bytes` bytes of a block should have."""

    def __init__(self, expected: int, num_bytes: int, path: Path) -> None:
        self.expected, self.left, self.path, self.found = expected, num_bytes, path, 0

    def take(self, values: Tensor) -> None:
        """Takes the next part of the block; raises KitError after the last where the data is not what was written."""
        data = tensor_bytes(values)
        self.found, self.left = crc32(data, self.found), self.left - data.nbytes
        if not self.left and self.found != self.expected:
            raise KitError(
                f"{self.path} is damaged: a block has not the checksum that it was written with: copy it again"
            )


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
    if fault := fault_of_types(metadata):
        raise KitError(f"{path} {fault}: copy the checkpoint again")
    return metadata
