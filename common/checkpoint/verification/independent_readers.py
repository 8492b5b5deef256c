"""The tensors of either side for the proof, read by other ways than those by which a conversion reads them.

Hugging Face's side comes through safetensors' own reader. On Megatron's side torch's own reader of archives tells
where a tensor's bytes lie, in torch_dist its own unpickler (of `weights_only`) what they are, and plain reads fetch
them. The pickles of `.metadata` and of a rank's file alone go through ours, which runs no code of theirs.
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
from torch.distributed.checkpoint import metadata as dcp

from common.checkpoint.formats.torch_dist_reader import load_metadata
from common.checkpoint.io.disk import empty
from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.pickled_tensors import TensorStub
from common.errors import KitError

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Stored(Protocol):
    """A tensor on the disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows [start, stop), in memory or in a mapped file; raises KitError where they are not all there."""
        ...


def num_bytes(tensor: Stored) -> int:
    """Size of its data."""
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


class HfTensors:
    """The tensors of a Hugging Face folder by name, as safetensors reads them."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        listed = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        self._file_of: dict[str, Any] = {}
        for name in set(listed):
            with (folder / name).open("rb") as stream:  # safetensors takes no name that is not UTF-8
                file = safe_open(f"/proc/self/fd/{stream.fileno()}", framework="pt")
            self._file_of |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> list[str]:
        """All tensors' names."""
        return sorted(self._file_of)

    def tensor(self, name: str) -> "HfTensor":
        """The tensor `name`; raises KeyError where there is none."""
        return HfTensor(self._file_of[name].get_slice(name))

    def get(self, name: str) -> "HfTensor | None":
        """The tensor `name`, or None."""
        return self.tensor(name) if name in self._file_of else None


class HfTensor:
    """A tensor of safetensors."""

    def __init__(self, slices: Any) -> None:
        self._slices, self.shape, self.dtype = slices, tuple(slices.get_shape()), KINDS[slices.get_dtype()]

    def rows(self, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Its rows [start, stop), of which `columns`; a view of the mapped file."""
        rows = slice(start, stop)
        return self._slices[rows] if columns is None else self._slices[rows, columns.start : columns.stop]


@dataclass(frozen=True)
class Strided:
    """A tensor whose elements lie in a file from byte `start` on, by torch's strides."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows [start, stop), in memory."""
        return self.part((slice(start, stop),))

    def part(self, at: tuple[slice, ...]) -> Tensor:
        """What lies at `at`, whose further dimensions are whole, in memory."""
        spans = [*at, *(slice(0, size) for size in self.shape[len(at) :])]
        sizes = [span.stop - span.start for span in spans]
        if 0 in sizes:
            return torch.empty(sizes, dtype=self.dtype)
        first = sum(span.start * step for span, step in zip(spans, self.stride, strict=True))
        count = 1 + sum((size - 1) * step for size, step in zip(sizes, self.stride, strict=True))
        data = _read(self.path, self.start + first * self.dtype.itemsize, count * self.dtype.itemsize)
        return data.view(self.dtype).as_strided(sizes, self.stride)


def _read(path: Path, start: int, size: int) -> Tensor:
    """The bytes [start, start + size) of a file, [size] uint8; raises KitError where it ends before."""
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


class _Span(io.RawIOBase):
    """A part of a file as a file of its own, as torch's reader of archives wants it."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = path.open("rb", buffering=0), start, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves as files do."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Where it stands."""
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
    """The content of a rank's file, each tensor in it as a Strided."""

    def read(start: int, size: int) -> bytes:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            return stream.read(size)

    length = path.stat().st_size
    state = ArchiveReader(read, length, path).load(foreign=True)
    with _Span(path, 0, length) as span:
        reader: Any = torch._C.PyTorchFileReader(cast(IO[bytes], span))

        def placed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: placed(one) for key, one in value.items()}
            if not isinstance(value, TensorStub):
                return value
            start = reader.get_record_offset(f"data/{value.storage.key}") + value.offset * value.dtype.itemsize
            return Strided(path, start, value.dtype, tuple(value.size), tuple(value.stride))

        return placed({key: value for key, value in state.items() if key.startswith("model")})


class DistTensors:
    """The tensors of a torch_dist checkpoint by their keys."""

    def __init__(self, path: Path) -> None:
        self.path, metadata = path, load_metadata(path / ".metadata", foreign=True)
        self.entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }
        self._places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        self.block = cache(self._block)

    def _block(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Strided:
        """The stored block at `offsets` of a tensor; raises KitError unless it is of `sizes` and the tensor's dtype."""
        place, dtype = self._places[key, offsets], self.entries[key].properties.dtype
        path = self.path / place.relative_path
        with _Span(path, place.offset, place.length) as span:
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
                raise KitError(f"{path}: what lies at byte {place.offset} is not the block of .metadata: copy it again")
            start = place.offset + reader.get_record_offset(f"data/{keys[0]}")
        start += tensor.storage_offset() * tensor.element_size()
        return Strided(path, start, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def tensor(self, key: str, layer: int | None = None) -> "DistTensor":
        """The tensor `key`, or of a stacked one the part of `layer`."""
        return DistTensor(self, key, layer)


class DistTensor:
    """A tensor of a torch_dist checkpoint, put together from its blocks as it is read."""

    def __init__(self, files: DistTensors, key: str, layer: int | None) -> None:
        entry = files.entries[key]
        self._files, self._key, self._lead = files, key, () if layer is None else (slice(layer, layer + 1),)
        self.shape, self.dtype = tuple(entry.size)[len(self._lead) :], entry.properties.dtype
        self._chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows [start, stop), in memory; raises KitError unless each element lies in one block."""
        wanted = (*self._lead, slice(start, stop), *(slice(0, size) for size in self.shape[1:]))
        sizes = (stop - start, *self.shape[1:])
        parts = list(self._parts(wanted))
        if len(parts) == 1 and parts[0][0].shape == tuple(span.stop - span.start for span in wanted):
            return parts[0][0].reshape(sizes)
        whole = torch.empty(tuple(span.stop - span.start for span in wanted), dtype=self.dtype)
        times = torch.zeros(whole.shape, dtype=torch.uint8)
        for part, at in parts:
            whole[at] = part
            times[at] += 1
        if (times != 1).any():
            number = int((times != 1).sum())
            raise KitError(f"{self._files.path}: {self._key}: {number} elements lie in no block or in several")
        return whole.reshape(sizes)

    def _parts(self, wanted: tuple[slice, ...]) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """What each block has of `wanted`, and where in it that belongs."""
        for offsets, sizes in self._chunks:
            ends = zip(offsets, sizes, wanted, strict=True)
            spans = [(max(first, span.start), min(first + size, span.stop)) for first, size, span in ends]
            if all(first < last for first, last in spans):
                block = self._files.block(self._key, offsets, sizes)
                here = tuple(slice(a - first, b - first) for (a, b), first in zip(spans, offsets, strict=True))
                there = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(spans, wanted, strict=True))
                yield block.part(here), there
