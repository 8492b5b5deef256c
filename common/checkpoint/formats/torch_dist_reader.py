"""Megatron-Core's torch_dist format, read without Megatron-Core.

`.metadata` is a pickled torch.distributed.checkpoint Metadata: the global shape and chunks of each tensor, and the
file, offset and length of each chunk, which holds what torch.save wrote for it. Layers are stacked: the tensor
`decoder.layers.mlp.linear_fc2.weight` is [layers, h, f]; some writers number them instead.
Source: megatron/core/dist_checkpointing/strategies/torch.py and torch/distributed/checkpoint/filesystem.py.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.checkpoint.formats.torch_archive import ArchiveFile
from common.checkpoint.io.checksums import check_file_name, check_size, check_small_files, read_checksums
from common.checkpoint.io.chunks import Chunk, coverage_error
from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.lazy_tensor import row_blocks, tensor_bytes
from common.checkpoint.io.mapped_file import load
from common.checkpoint.untrusted.metadata_types import is_metadata, is_object, is_tensor, metadata_type_error
from common.checkpoint.untrusted.restricted_unpickler import RestrictedUnpickler
from common.errors import KitError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of a tensor and its storage metadata: file, offset and length in bytes."""

    chunk: Chunk
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


class TorchDistReader:
    """The tensors of a torch_dist checkpoint by their keys; raises KitError when it is damaged or incomplete."""

    def __init__(self, path: Path) -> None:
        self.path, checksums = path, read_checksums(path)
        check_small_files(path, checksums)
        try:
            metadata = load_metadata(path / ".metadata", foreign=True)
            self.tensors = self._stored_tensors(metadata)
            storage = {index.fqn: info for index, info in metadata.storage_data.items() if index.offset is None}
            entries = metadata.state_dict_metadata.items()
            for info in storage.values():
                check_file_name(path / ".metadata", str(info.relative_path))
            self.objects = {key: storage[key] for key, entry in entries if is_object(entry)}
        except KitError:
            raise
        except Exception as error:  # unpickling raises whatever its objects raise
            raise KitError(f"{path / '.metadata'} cannot be read ({error!r}): copy the checkpoint again") from error

        def open_file(name: str) -> ArchiveFile:
            """The file, its size checked."""
            file = ArchiveFile(path / name)
            check_size(path / name, file.size, checksums)
            return file

        self._file = cache(open_file)

    def _stored_tensors(self, metadata: "Metadata") -> dict[str, StoredTensor]:
        storage = {(index.fqn, _tuple(index.offset)): info for index, info in metadata.storage_data.items()}
        entries = metadata.state_dict_metadata.items()
        return {key: self._stored_tensor(key, entry, storage) for key, entry in entries if is_tensor(entry)}

    def _stored_tensor(self, key: str, entry: "TensorStorageMetadata", storage: dict[Any, Any]) -> StoredTensor:
        chunks, whole = [], whole_tensor(_tuple(entry.size))
        for each in entry.chunks:
            chunk = Chunk(_tuple(each.offsets), _tuple(each.sizes))
            if not chunk.is_within(whole):
                raise KitError(f"{self.path}: .metadata has an out-of-bounds chunk of {key}: copy it again")
            info = storage.get((key, chunk.offsets))
            if info is None:
                raise KitError(
                    f"{self.path}: .metadata has no storage metadata for {key} at {list(chunk.offsets)}: copy it again"
                )
            check_file_name(self.path / ".metadata", str(info.relative_path))
            chunks.append(StoredChunk(chunk, info.relative_path, info.offset, info.length))
        return StoredTensor(whole.sizes, entry.properties.dtype, tuple(chunks))

    def _read_chunk(self, tensor: StoredTensor, stored: StoredChunk, layer: int | None = None) -> Tensor:
        """The stored chunk, or one layer of it."""
        value = self._file(stored.file).read(stored.offset, stored.length)
        if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != (stored.chunk.sizes, tensor.dtype):
            raise KitError(
                f"{self.path / stored.file}: the data at byte {stored.offset} does not match the chunk in .metadata"
            )
        return value if layer is None else value[layer - stored.chunk.offsets[0]]

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """The whole tensor `key`, or one layer of a stacked one.

        Not copied where one chunk holds all of it. Raises KitError unless the chunks hold each element once.
        """
        tensor = self.tensors[key]
        first = () if layer is None else (layer,)
        shape = tensor.shape if layer is None else tensor.shape[1:]
        requested = Chunk((*first, *(0,) * len(shape)), (*(1 for _ in first), *shape))
        found = self._find(key, requested)
        if len(found) == 1 and found[0][1] == requested and (layer is not None or found[0][0].chunk == requested):
            return self._read_chunk(tensor, found[0][0], layer)
        whole = torch.empty(requested.sizes, dtype=tensor.dtype)
        for stored, part in found:
            whole[part.slices_in(requested)] = self._read_chunk(tensor, stored)[part.slices_in(stored.chunk)]
        return whole.reshape(shape)

    def check_coverage(self, key: str) -> None:
        """Raises KitError unless the chunks of `key` hold each of its elements once."""
        self._find(key, whole_tensor(self.tensors[key].shape))

    def _find(self, key: str, requested: Chunk) -> list[tuple[StoredChunk, Chunk]]:
        """Each stored chunk that overlaps `requested`, and the overlap.

        Raises KitError unless the overlaps cover `requested` exactly once.
        """
        chunks = self.tensors[key].chunks
        found = [(stored, part) for stored in chunks if (part := stored.chunk.overlap(requested))]
        if reason := coverage_error(requested, (part for _, part in found)):
            raise KitError(f"{self.path}: {key} {reason}: the checkpoint is incomplete; copy it again")
        return found

    def blocks(self, key: str, requested: Chunk) -> Iterator[tuple[tuple[slice, ...], Tensor, "Checksum | None"]]:
        """The part `requested` of the tensor `key` in blocks of some megabytes: slices into it, and their values.

        Blocks of a chunk that is read whole come with its checksum, which is to be updated with each of them in order.
        Raises KitError where chunks are missing.
        """
        tensor = self.tensors[key]
        for stored, part in sorted(self._find(key, requested), key=lambda each: (each[0].file, each[0].offset)):
            value, file = self._read_chunk(tensor, stored), self._file(stored.file)
            whole = part == stored.chunk and stored.offset in file.checksums
            checksum = Checksum(file.checksums[stored.offset], value.nbytes, file.path) if whole else None
            slices = part.slices_in(requested)
            if not value.dim():
                yield slices, value, None
                continue
            row = slices[0].start
            for (rows,) in row_blocks([value[part.slices_in(stored.chunk)]]):
                yield (slice(row, row + len(rows)), *slices[1:]), load(rows), checksum
                row += len(rows)

    def object(self, key: str) -> Any:
        """The object that torch.save wrote under `key`; raises KitError where it is damaged or could run code."""
        info = self.objects[key]
        return self._file(info.relative_path).read(info.offset, info.length)


class Checksum:
    """Checks the CRC-32 of a chunk of `num_bytes` bytes."""

    def __init__(self, expected: int, num_bytes: int, path: Path) -> None:
        self.expected, self.remaining, self.path, self.found = expected, num_bytes, path, 0

    def update(self, values: Tensor) -> None:
        """Adds the next values of the chunk; raises KitError after the last where the data is not what was written."""
        data = tensor_bytes(values)
        self.found, self.remaining = crc32(data, self.found), self.remaining - data.nbytes
        if not self.remaining and self.found != self.expected:
            raise KitError(f"{self.path} is damaged: the CRC-32 of a chunk does not match: copy it again")


def whole_tensor(shape: tuple[int, ...]) -> Chunk:
    """A tensor of `shape` as one chunk."""
    return Chunk((0,) * len(shape), shape)


def _tuple(size: Any) -> tuple[int, ...]:
    return tuple(size) if size is not None else ()


def load_metadata(path: Path, *, foreign: bool = False) -> "Metadata":
    """The content of a `.metadata` file; raises KitError where it is damaged or could run code.

    foreign: allow classes of other packages, as for RestrictedUnpickler.
    """
    gc_enabled = gc.isenabled()
    gc.disable()  # it would scan millions of live objects again and again, which takes a quarter longer
    try:
        metadata = RestrictedUnpickler(path.read_bytes(), path, foreign=foreign).load()
    except KitError:
        raise
    except Exception as error:  # unpickling raises whatever its objects raise
        raise KitError(f"{path} cannot be read ({error!r}): copy the checkpoint again") from error
    finally:
        if gc_enabled:
            gc.enable()
    if not is_metadata(metadata):
        raise KitError(f"{path} holds no metadata of torch.distributed.checkpoint: the checkpoint is incomplete")
    if reason := metadata_type_error(metadata):
        raise KitError(f"{path} {reason}: copy the checkpoint again")
    return metadata
