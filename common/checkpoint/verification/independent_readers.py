"""Readers of both sides for verification, independent of those of the conversion.

Hugging Face tensors are read by safetensors. For Megatron tensors torch's archive reader finds the bytes, in torch_dist
torch's `weights_only` unpickler gives dtype and shape, and plain reads fetch the data. Only the pickles of `.metadata`
and of rank files are read by our unpickler, which runs no code from them.
"""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor, _weights_only_unpickler

from common.checkpoint.formats.torch_dist_reader import load_metadata
from common.checkpoint.io.direct_io import empty
from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.metadata_types import is_tensor
from common.checkpoint.untrusted.pickled_tensors import TensorStub
from common.errors import KitError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class StoredTensor(Protocol):
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows [start, stop), in memory or in a mapped file; raises KitError where some are missing."""
        ...


def num_bytes(tensor: StoredTensor) -> int:
    """Size of its data."""
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


class HfTensors:
    """The tensors of a Hugging Face folder by name, as safetensors reads them."""

    def __init__(self, folder: Path, single: str = "model.safetensors") -> None:
        index = folder / "model.safetensors.index.json"
        listed = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else [single]
        self._file_of: dict[str, Any] = {}
        for name in set(listed):
            with (folder / name).open("rb") as stream:  # safetensors rejects paths that are not UTF-8
                file = safe_open(f"/proc/self/fd/{stream.fileno()}", framework="pt")
            self._file_of |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._file_of)

    def tensor(self, name: str) -> "HfTensor":
        """The tensor `name`; raises KeyError where there is none."""
        return HfTensor(self._file_of[name].get_slice(name))

    def get(self, name: str) -> "HfTensor | None":
        """The tensor `name`, or None."""
        return self.tensor(name) if name in self._file_of else None


class HfTensor:
    """A tensor in a safetensors file."""

    def __init__(self, slices: Any) -> None:
        self._slices, self.shape, self.dtype = slices, tuple(slices.get_shape()), DTYPES[slices.get_dtype()]

    def rows(self, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Its rows [start, stop), only `columns` if given; a view of the mapped file."""
        rows = slice(start, stop)
        return self._slices[rows] if columns is None else self._slices[rows, columns.start : columns.stop]


@dataclass(frozen=True)
class StridedTensor:
    """A tensor in a file from byte `start` on, with torch's strides."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows [start, stop), in memory."""
        return self.part((slice(start, stop),))

    def part(self, at: tuple[slice, ...]) -> Tensor:
        """The part at `at`, in memory; missing trailing dimensions are whole."""
        spans = [*at, *(slice(0, size) for size in self.shape[len(at) :])]
        sizes = [span.stop - span.start for span in spans]
        if 0 in sizes:
            return torch.empty(sizes, dtype=self.dtype)
        first = sum(span.start * step for span, step in zip(spans, self.stride, strict=True))
        count = 1 + sum((size - 1) * step for size, step in zip(sizes, self.stride, strict=True))
        data = _read(self.path, self.start + first * self.dtype.itemsize, count * self.dtype.itemsize)
        return data.view(self.dtype).as_strided(sizes, self.stride)


def _read(path: Path, start: int, size: int) -> Tensor:
    """The bytes [start, start + size) of a file, [size] uint8; raises KitError where the file is shorter."""
    data = empty((size,), torch.uint8)
    with path.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), start, size, os.POSIX_FADV_WILLNEED)
        stream.seek(start)
        left = memoryview(data.numpy().data)
        while left.nbytes:
            got = stream.readinto(left)
            if not got:
                raise KitError(f"{path} ends before byte {start + size}: copy the checkpoint again")
            left = left[got:]
    return data


class _FilePart(io.RawIOBase):
    """A part of a file as a stream, for torch's archive reader."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = path.open("rb", buffering=0), start, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """As for files."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Reads up to the end of the part."""
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        got = self._file.readinto(view) or 0
        self._at += got
        return got

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()


def rank_state(path: Path) -> dict[str, Any]:
    """The content of a rank's file, with a StridedTensor for each tensor."""

    def read(start: int, size: int) -> bytes:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            return stream.read(size)

    length = path.stat().st_size
    state = ArchiveReader(read, length, path).load(foreign=True)
    with _FilePart(path, 0, length) as span:
        reader: Any = torch._C.PyTorchFileReader(cast(IO[bytes], span))

        def placed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: placed(one) for key, one in value.items()}
            if not isinstance(value, TensorStub):
                return value
            start = reader.get_record_offset(f"data/{value.storage.key}") + value.offset * value.dtype.itemsize
            return StridedTensor(path, start, value.dtype, tuple(value.size), tuple(value.stride))

        return placed({key: value for key, value in state.items() if key.startswith("model")})


class DistTensors:
    """The tensors of a torch_dist checkpoint by their keys."""

    def __init__(self, path: Path) -> None:
        self.path, metadata = path, load_metadata(path / ".metadata", foreign=True)
        self.entries = {key: entry for key, entry in metadata.state_dict_metadata.items() if is_tensor(entry)}
        self._storage = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        self.chunk = cache(self._chunk)

    def _chunk(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> StridedTensor:
        """The stored chunk at `offsets`; raises KitError unless it has `sizes` and the tensor's dtype."""
        info, dtype = self._storage[key, offsets], self.entries[key].properties.dtype
        path = self.path / info.relative_path
        with _FilePart(path, info.offset, info.length) as span:
            reader: Any = torch._C.PyTorchFileReader(cast(IO[bytes], span))
            unpickler = _weights_only_unpickler.Unpickler(io.BytesIO(reader.get_record("data.pkl")))
            keys = []

            def storage(pid: Any) -> Any:
                keys.append(pid[2])
                kind = torch.uint8 if pid[1] is torch.UntypedStorage else pid[1].dtype
                untyped = torch.UntypedStorage(pid[4] * kind.itemsize, device="meta")
                return torch.storage.TypedStorage(wrap_storage=untyped, dtype=kind, _internal=True)

            unpickler.persistent_load = storage  # type: ignore[method-assign]
            tensor = unpickler.load()
            if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (sizes, dtype):
                raise KitError(
                    f"{path}: the data at byte {info.offset} does not match the chunk in .metadata: copy it again"
                )
            start = info.offset + reader.get_record_offset(f"data/{keys[0]}")
        start += tensor.storage_offset() * tensor.element_size()
        return StridedTensor(path, start, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def tensor(self, key: str, layer: int | None = None) -> "DistTensor":
        """The tensor `key`, or one layer of a stacked one."""
        return DistTensor(self, key, layer)


class DistTensor:
    """A tensor of a torch_dist checkpoint, assembled from its chunks as it is read."""

    def __init__(self, files: DistTensors, key: str, layer: int | None) -> None:
        entry = files.entries[key]
        self._files, self._key, self._lead = files, key, () if layer is None else (slice(layer, layer + 1),)
        self.shape, self.dtype = tuple(entry.size)[len(self._lead) :], entry.properties.dtype
        self._chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows [start, stop), in memory; raises KitError unless each element is in exactly one chunk."""
        requested = (*self._lead, slice(start, stop), *(slice(0, size) for size in self.shape[1:]))
        sizes = (stop - start, *self.shape[1:])
        parts = list(self._parts(requested))
        if len(parts) == 1 and parts[0][0].shape == tuple(span.stop - span.start for span in requested):
            return parts[0][0].reshape(sizes)
        whole = torch.empty(tuple(span.stop - span.start for span in requested), dtype=self.dtype)
        times = torch.zeros(whole.shape, dtype=torch.uint8)
        for part, at in parts:
            whole[at] = part
            times[at] += 1
        if (times != 1).any():
            number = int((times != 1).sum())
            raise KitError(f"{self._files.path}: {self._key}: {number} elements are in no chunk or in more than one")
        return whole.reshape(sizes)

    def _parts(self, requested: tuple[slice, ...]) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """The overlap of each chunk with `requested`, and its slices there."""
        for offsets, sizes in self._chunks:
            ends = zip(offsets, sizes, requested, strict=True)
            spans = [(max(first, span.start), min(first + size, span.stop)) for first, size, span in ends]
            if all(first < last for first, last in spans):
                chunk = self._files.chunk(self._key, offsets, sizes)
                here = tuple(slice(a - first, b - first) for (a, b), first in zip(spans, offsets, strict=True))
                there = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(spans, requested, strict=True))
                yield chunk.part(here), there
