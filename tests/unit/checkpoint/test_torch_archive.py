"""Archives against torch itself: it reads what is written here, and what it wrote is read here."""

import io
import mmap
import random
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.checkpoint.formats.torch_archive import (
    ALIGNMENT,
    ArchiveFile,
    ArchiveWriter,
    _ZipWriter,
    write_archive,
    write_archives,
)
from common.checkpoint.io.direct_io import BLOCK_BYTES
from common.checkpoint.io.lazy_tensor import LazyTensor, tensor_bytes
from common.errors import KitError
from common.platforms.cuda_shim import TORCH
from tests.unit.checkpoint.small import bitwise_equal

# torch 2.3 has the dtype, and cannot save it.
UINT16 = [torch.tensor([1, 65535], dtype=torch.uint16)] if TORCH >= (2, 4) else []
TENSORS = {
    "bf16": torch.randn(3, 5).bfloat16(),
    "fp16": torch.randn(7).half(),
    "fp32": torch.tensor([[1.5, float("nan")], [float("-inf"), -0.0]]),
    "fp64": torch.randn(2, 2, 2, dtype=torch.float64),
    "int64": torch.tensor([-(2**62), 7]),
    "int32": torch.tensor([[3]], dtype=torch.int32),
    "uint8": torch.arange(200, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.25),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "sliced": torch.arange(20.0)[3:15:2],
    "grad": torch.nn.Parameter(torch.ones(2)),
}


def archive(value: Any) -> bytes:
    stream = io.BytesIO()
    assert write_archive(stream, value) == len(stream.getvalue())
    return stream.getvalue()


def torch_save(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: [[tensor]])


def same(one: Any, other: Any) -> bool:
    """Whether two nested objects agree to the last bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and bitwise_equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("kind", ["tensors", "lazy tensors"])
def test_torch_loads_what_was_written(tmp_path: Path, mapped: bool, kind: str) -> None:
    tensors = TENSORS if kind == "tensors" else {name: lazy(tensor) for name, tensor in TENSORS.items()}
    path = put(tmp_path / "a.pt", archive({"model": tensors, "iteration": 7, "nested": [tensors["fp16"], ("a", None)]}))
    loaded = torch.load(path, weights_only=True, mmap=mapped)
    assert same(dict(loaded["model"]), TENSORS) and loaded["iteration"] == 7
    assert same(loaded["nested"], [TENSORS["fp16"], ("a", None)])
    assert not any(tensor.requires_grad for tensor in loaded["model"].values())


def test_torch_loads_arguments_beside_tensors(tmp_path: Path) -> None:
    arguments = Namespace(num_layers=4, rotary_base=10**6, dtype=torch.bfloat16, virtual=None)
    path = put(tmp_path / "a.pt", archive({"args": arguments, "model": OrderedDict(a=torch.ones(2))}))
    assert torch.load(path, weights_only=False)["args"] == arguments
    assert ArchiveFile(path).read()["args"] == arguments


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert same(ArchiveFile(put(tmp_path / "a.pt", archive(TENSORS))).read(), TENSORS)


def test_one_tensor_saved_twice_is_one_record(tmp_path: Path) -> None:
    shared = lazy(torch.randn(100))
    path = put(tmp_path / "a.pt", archive({"a": shared, "b": shared}))
    loaded = torch.load(path, weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() and bitwise_equal(loaded["a"], shared.materialize())


def test_tensors_of_several_archives_are_made_in_turn_and_reported() -> None:
    streams, progress, began = [io.BytesIO(), io.BytesIO()], [], []

    def make(size: int) -> LazyTensor:
        def parts() -> list[list[Tensor]]:
            began.append(size)
            return [[torch.full((size,), 1.0)]]

        return LazyTensor((size,), torch.float32, parts)

    values = [{"a": make(1000), "b": make(2000), "c": make(10)}, {"a": make(1001), "b": make(0)}]
    sizes = write_archives(
        [ArchiveWriter(stream, value) for stream, value in zip(streams, values, strict=True)], progress.append
    )
    assert began == [1000, 1001, 2000, 0, 10] and progress == [4000, 4004, 8000, 0, 40]
    assert sizes == [len(stream.getvalue()) for stream in streams]
    for stream, value in zip(streams, values, strict=True):
        loaded = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
        assert same(loaded, {name: tensor.materialize() for name, tensor in value.items()})


def test_a_tensor_other_than_announced_is_an_internal_error() -> None:
    with pytest.raises(AssertionError):
        archive(LazyTensor((2,), torch.float32, lambda: [[torch.ones(3)]]))
    with pytest.raises(AssertionError):
        archive({"a": LazyTensor((2,), torch.float32, lambda: [[torch.ones(1)]]), "b": torch.ones(3)})


def test_records_are_at_multiples_of_64_with_their_checksums() -> None:
    data = archive({str(size): torch.zeros(size) for size in range(1, 40)})
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        assert zipped.testzip() is None
        for info in zipped.infolist():
            start = info.header_offset + 30 + sum(data[info.header_offset + at] for at in (26, 28))
            assert start % ALIGNMENT == 0 and zlib.crc32(data[start : start + info.file_size]) == info.CRC


@pytest.mark.parametrize("before", [0, 64, 100, 333])
@pytest.mark.parametrize("write", [archive, torch_save])
def test_an_archive_may_be_inside_a_larger_file(tmp_path: Path, before: int, write: Callable[[Any], bytes]) -> None:
    first, second = write(TENSORS), write({"other": torch.ones(3)})
    file = ArchiveFile(put(tmp_path / "a.distcp", b"x" * before + first + second + b"PK\5\6 and so on"))
    loaded = file.read(before, len(first))
    assert same(loaded, TENSORS) and not any(each.data_ptr() % each.itemsize for each in loaded.values())
    assert same(file.read(before + len(first), len(second)), {"other": torch.ones(3)})


def test_whatever_torch_saves_beside_weights_is_read(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {
        "views": [base[2:4], base.reshape(3, 4).t()],
        "strided": torch.randn(4, 6)[:, ::2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "linear": OrderedDict(torch.nn.Linear(2, 3).state_dict()),
        "rng": [torch.get_rng_state(), np.random.RandomState(0).get_state(), random.Random(0).getstate()],
        "numpy": [np.arange(3, dtype=np.float32), np.float64(2.5), np.int64(3)],
        "new dtypes": [torch.ones(2).to(torch.float8_e4m3fn), *UINT16],
        "size": torch.Size([2, 3]),
        "plain": [None, True, 2**70, "人", b"\xff\0", b"", bytearray(b"a"), {1}, 1.5, complex(1, 2), range(3)],
    }
    loaded = ArchiveFile(put(tmp_path / "a.pt", torch_save(state))).read()
    assert same(loaded.pop("size"), state.pop("size"))
    assert same(dict(loaded["linear"]), dict(state["linear"])) and bitwise_equal(
        loaded["parameter"], state["parameter"]
    )
    assert same({**loaded, "linear": 0, "parameter": 0}, {**state, "linear": 0, "parameter": 0})


def test_attributes_of_a_tensor_are_left_out(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.sequence_parallel = True  # type: ignore[attr-defined]
    assert torch.load(io.BytesIO(torch_save(tensor))).sequence_parallel
    loaded = ArchiveFile(put(tmp_path / "a.pt", torch_save(tensor))).read()
    assert bitwise_equal(loaded, tensor) and not hasattr(loaded, "sequence_parallel")


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    path = put(tmp_path / "a.pt", archive({"a": torch.zeros(1000)}))
    before = path.read_bytes()
    ArchiveFile(path).read()["a"].fill_(1)
    assert path.read_bytes() == before and not ArchiveFile(path).read()["a"].any()


@pytest.mark.parametrize("write", [archive, torch_save])
def test_a_file_cut_short_anywhere_is_reported(tmp_path: Path, write: Callable[[Any], bytes]) -> None:
    data = write({"a": torch.arange(6.0), "b": Namespace(c=1)})
    for length in [*range(1, len(data), 37), len(data) - 1]:
        path = put(tmp_path / "cut.pt", data[:length])
        with pytest.raises(KitError, match=r"cut\.pt is not a complete torch\.save file .*: copy it again"):
            ArchiveFile(path).read()


@pytest.mark.parametrize("write", [archive, torch_save])
def test_a_damaged_byte_gives_an_error_that_names_the_file(tmp_path: Path, write: Callable[[Any], bytes]) -> None:
    data = write({"a": torch.arange(6.0), "b": Namespace(c=1)})
    refused = 0
    for at in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        try:
            ArchiveFile(put(tmp_path / "bad.pt", damaged)).read()  # where it pads, and the numbers, may be anything
        except KitError as error:
            refused += 1
            assert "bad.pt" in str(error)
    assert refused > 40


def test_files_that_are_no_archive_are_reported(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"none\.pt cannot be read \(No such file"):
        ArchiveFile(tmp_path / "none.pt")
    with pytest.raises(KitError, match=r"cannot be read \(Is a directory"):
        ArchiveFile(tmp_path)
    with pytest.raises(KitError, match=r"a\.pt is empty"):
        ArchiveFile(put(tmp_path / "a.pt", b""))
    old = torch_save({"a": 1}, _use_new_zipfile_serialization=False)
    with pytest.raises(KitError, match="is not a complete torch.save file"):
        ArchiveFile(put(tmp_path / "a.pt", old)).read()


def rezipped(data: bytes, compress: bool = False, **records: bytes) -> bytes:
    """The archive with other records."""
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", kind) as new:
        for info in old.infolist():
            new.writestr(info.filename, records.get(info.filename.partition("/")[2], old.read(info)))
    return stream.getvalue()


def test_records_of_another_kind_are_reported(tmp_path: Path) -> None:
    data = archive({"a": torch.ones(3)})
    assert same(ArchiveFile(put(tmp_path / "a.pt", rezipped(data))).read(), {"a": torch.ones(3)})
    with pytest.raises(KitError, match="record b'archive/data.pkl' is compressed"):
        ArchiveFile(put(tmp_path / "a.pt", rezipped(data, compress=True))).read()
    with pytest.raises(KitError, match="was written big-endian"):
        ArchiveFile(put(tmp_path / "a.pt", rezipped(data, byteorder=b"big"))).read()
    with pytest.raises(KitError, match="record data/0 is missing or too short"):
        ArchiveFile(put(tmp_path / "a.pt", rezipped(data, **{"data/0": b"1234"}))).read()
    lost = data.replace(b"archive/data/0", b"archive/data/9")
    with pytest.raises(KitError, match="record data/0 is missing or too short"):
        ArchiveFile(put(tmp_path / "a.pt", lost)).read()


def test_records_beyond_4_gib_are_found_by_torch(tmp_path: Path) -> None:
    tensors = {"near": torch.arange(5.0), "far": torch.arange(7.0)}
    pickled = zipfile.ZipFile(io.BytesIO(archive(tensors))).read("archive/data.pkl")
    path = tmp_path / "a.pt"
    with path.open("wb") as stream:
        writer = _ZipWriter(stream)
        writer.write("archive/data.pkl", [memoryview(pickled)])
        writer.write("archive/byteorder", [memoryview(b"little")])
        writer.write("archive/data/0", [tensor_bytes(tensors["near"])])
        hole = (4 << 30) + ALIGNMENT  # takes no room on the disk
        stream.seek(hole, io.SEEK_CUR)
        writer.position += hole
        writer.write("archive/data/1", [tensor_bytes(tensors["far"])])
        writer.write("archive/version", [memoryview(b"3\n")])
        assert writer.close() == stream.tell() > 4 << 30
    for mapped in (True, False):
        assert same(torch.load(path, weights_only=True, mmap=mapped), tensors)
    assert same(ArchiveFile(path).read(), tensors)


class Sparse(io.FileIO):
    """A file with holes in the place of zeros."""

    zeros = bytes(BLOCK_BYTES)

    def write(self, data: Any) -> int:
        if memoryview(data).nbytes == BLOCK_BYTES and bytes(data) == self.zeros:
            self.seek(BLOCK_BYTES, io.SEEK_CUR)
            return BLOCK_BYTES
        return super().write(data)


def test_a_tensor_larger_than_4_gib_is_read_by_torch(tmp_path: Path) -> None:
    with (tmp_path / "zeros").open("wb+") as zeros:
        zeros.truncate((4 << 30) + 4096)
        large = torch.frombuffer(mmap.mmap(zeros.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    large[0], large[-1] = 3, 5
    tensors = {"first": torch.arange(3.0), "large": large, "far and large": large, "last": torch.arange(4.0)}
    path = tmp_path / "a.pt"
    with Sparse(path, "w") as stream:
        write_archive(stream, {name: lazy(tensor) for name, tensor in tensors.items()})
    for loaded in (torch.load(path, weights_only=True, mmap=True), ArchiveFile(path).read()):
        for found in (loaded.pop("large"), loaded.pop("far and large")):
            assert found.shape == large.shape and found[[0, 1, -2, -1]].tolist() == [3, 0, 0, 5]
        assert same(loaded, {"first": tensors["first"], "last": tensors["last"]})


def test_more_records_than_16_bits_count() -> None:
    stream = io.BytesIO()
    writer = _ZipWriter(stream)
    for index in range(0x10001):
        writer.write(f"a/{index}", [])
    writer.close()
    assert len(zipfile.ZipFile(stream).infolist()) == 0x10001
