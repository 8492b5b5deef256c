"""Every byte is written unchanged, by whichever way the file system allows, and failures are reported."""

import errno
import gc
import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint.io import direct_io, file_writer, mapped_file
from common.checkpoint.io.direct_io import SECTOR, prefetch
from common.checkpoint.io.file_writer import FileWriter
from common.checkpoint.io.mapped_file import MappedFile, load
from common.errors import KitError

NEAR_SECTORS = [0, 1, SECTOR - 1, SECTOR, SECTOR + 1, 3 * SECTOR + 5]


def data_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.fixture(params=["direct", "cached", "other multiples"])
def io_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How files are read and written: past the cache, or through it because the file system says so, early or late."""
    if request.param == "cached":
        opened = os.open

        def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opened(path, flags, *more, **named)

        monkeypatch.setattr(os, "open", refuse)
    if request.param == "other multiples":
        for name in ("preadv", "pwrite"):
            monkeypatch.setattr(os, name, refuse_direct(getattr(os, name)))
    yield request.param


def num_handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def refuse_direct(call: Any) -> Any:
    def refuse(handle: int, *more: Any) -> Any:
        if direct_io.is_direct(handle):
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(handle, *more)

    return refuse


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (direct_io, file_writer):
        monkeypatch.setattr(module, "BLOCK_BYTES", 2 * SECTOR)
    monkeypatch.setattr(direct_io, "_free_buffers", [])


@pytest.mark.parametrize("size", NEAR_SECTORS)
def test_a_file_holds_what_was_written(tmp_path: Path, size: int, io_mode: str, small_blocks: None) -> None:
    data = data_of(size)
    with FileWriter(tmp_path / "file") as writer:
        for start in range(0, size, 1000):
            assert writer.write(memoryview(data)[start : start + 1000]) == len(data[start : start + 1000])
        assert writer.write(b"end") == 3 and writer.write(bytearray()) == 0
    assert (tmp_path / "file").read_bytes() == data + b"end"


def test_partial_writes_are_completed(tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: put(handle, data[:SECTOR], at))
    with FileWriter(tmp_path / "file") as writer:
        writer.write(data_of(5 * SECTOR + 7))
    assert (tmp_path / "file").read_bytes() == data_of(5 * SECTOR + 7)


def test_a_file_is_on_the_disk_after_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    with FileWriter(tmp_path / "file") as writer:
        writer.write(b"abc")
        assert not synced
    assert synced == [3]


@pytest.mark.parametrize("when", ["soon", "at the end"])
def test_a_disk_that_refuses_is_reported_and_leaves_no_thread_or_handle(
    tmp_path: Path, when: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    threads, handles = threading.active_count(), num_handles()
    with pytest.raises(OSError, match="No space left"), FileWriter(tmp_path / "file") as writer:
        writer.write(data_of(5 if when == "at the end" else 50 * SECTOR))
    assert threading.active_count() == threads and num_handles() == handles


def test_a_writer_that_is_left_by_an_error_raises_that_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), FileWriter(tmp_path / "file") as writer:
        writer.write(b"abc")
        raise ZeroDivisionError


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("start", NEAR_SECTORS)
def test_data_at_any_offset_of_a_file_is_loaded(
    tmp_path: Path, start: int, io_mode: str, cached: bool, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(9 * SECTOR + 99)
    (tmp_path / "file").write_bytes(data)
    file = MappedFile(tmp_path / "file")
    monkeypatch.setattr(mapped_file._Reader, "_in_cache", lambda *given: cached)
    for size in (1, 2, SECTOR, 2 * SECTOR + 1, len(data) - start):
        mapped = file.bytes[start : start + size]
        loaded = load(mapped)
        assert loaded.numpy().tobytes() == data[start : start + size]
        assert loaded.data_ptr() != mapped.data_ptr()


def test_views_keep_their_shape_and_order(tmp_path: Path) -> None:
    full = torch.randn(300, 70).bfloat16()
    (tmp_path / "file").write_bytes(b"12" + full.view(torch.uint8).numpy().tobytes())
    matrix = MappedFile(tmp_path / "file").tensor(2, full.nbytes, torch.bfloat16).reshape(300, 70)
    views = (matrix, matrix[:, 3:50], matrix[7], matrix.t(), matrix[5:9, 1:2], matrix[:0], matrix[3, 4])
    expected = (full, full[:, 3:50], full[7], full.t(), full[5:9, 1:2], full[:0], full[3, 4])
    for view, tensor in zip(views, expected, strict=True):
        loaded = load(view)
        assert torch.equal(loaded, tensor) and loaded.shape == tensor.shape
        assert not loaded.numel() or loaded.data_ptr() != view.data_ptr()


def test_a_tensor_in_no_file_is_itself(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    assert load(tensor) is tensor
    (tmp_path / "file").write_bytes(bytes(100))
    file = MappedFile(tmp_path / "file")
    assert torch.equal(file.tensor(3, 8, torch.float32), torch.zeros(2))  # at an odd place: a copy
    assert load(tensor) is tensor


def test_a_file_that_has_become_shorter_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5 * SECTOR))
    file = MappedFile(tmp_path / "file")
    os.truncate(tmp_path / "file", SECTOR)
    with pytest.raises(OSError, match="shorter"):
        load(file.bytes[SECTOR : 3 * SECTOR])


def test_a_files_handles_are_closed_with_the_last_of_its_tensors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    handles = num_handles()
    tensor = MappedFile(tmp_path / "file").bytes[1:5]
    gc.collect()
    assert torch.equal(load(tensor), torch.zeros(4, dtype=torch.uint8)) and load(tensor) is not tensor
    del tensor
    gc.collect()
    assert num_handles() == handles


def test_few_of_many_files_are_open(tmp_path: Path) -> None:
    files = []
    handles = num_handles()
    for i in range(60):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 3)
        files.append(MappedFile(tmp_path / str(i)))
    assert num_handles() == handles
    for _ in range(2):
        assert [load(file.bytes).tolist() for file in files] == [[i] * 3 for i in range(60)]
        assert num_handles() <= handles + 2 * mapped_file.MAX_OPEN_FILES
    del files
    gc.collect()
    assert num_handles() == handles


def test_a_replaced_file_is_not_read_for_the_mapped_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    file = MappedFile(tmp_path / "file")
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(tmp_path / "file")
    assert bytes(file.bytes.numpy()) == file.map[0:3] == b"old"
    with pytest.raises(OSError, match="the file was replaced by another while it was read"):
        load(file.bytes)


def test_the_remedy_is_named_where_no_file_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(KitError, match=r"Too many open files\): raise the limit, as by `ulimit -n 4096`"):
            MappedFile(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_pages_in_the_cache_are_known(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data_of(64 * SECTOR))
    file = MappedFile(path)
    (mapped,) = [each for each in mapped_file._readers.values() if each.address == file.bytes.data_ptr()]
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not mapped._in_cache(0, 64 * SECTOR)
        stream.read()
    assert mapped._in_cache(0, 64 * SECTOR) and mapped._in_cache(3 * SECTOR, 3 * SECTOR + 1)


def test_memory_is_reused_but_never_while_in_use(tmp_path: Path) -> None:
    data = data_of(40 * SECTOR)
    (tmp_path / "file").write_bytes(data)
    file = MappedFile(tmp_path / "file")
    held = [load(file.bytes[i * SECTOR : (i + 1) * SECTOR])[10:] for i in range(40)]
    assert [part.numpy().tobytes() for part in held] == [data[i * SECTOR + 10 : (i + 1) * SECTOR] for i in range(40)]
    del held
    free = len(direct_io._free_buffers)
    assert free >= 40
    load(file.bytes)
    assert len(direct_io._free_buffers) == free


def test_buffers_are_memory_of_the_process() -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10

    before = anonymous()
    tensor = direct_io.empty((32 << 20,), torch.uint8).fill_(1)
    assert anonymous() - before > 30 << 20
    del tensor
    assert anonymous() - before < 8 << 20


def test_items_come_in_their_order_and_a_few_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10):
            made.append(item)
            yield item

    each = prefetch(items(), depth=2)
    assert next(each) == 0
    for _ in range(100):
        if len(made) == 3:
            break
        threading.Event().wait(0.02)
    threading.Event().wait(0.1)
    assert made == [0, 1, 2]
    assert list(each) == list(range(1, 10)) and not list(prefetch([]))


def test_what_fails_in_the_thread_is_raised_where_it_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    each = prefetch(items())
    assert next(each) == 1
    with pytest.raises(ZeroDivisionError):
        next(each)


def test_a_reader_that_stops_early_leaves_no_thread() -> None:
    threads = threading.active_count()
    each = prefetch(range(10))
    next(each)
    each.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads
