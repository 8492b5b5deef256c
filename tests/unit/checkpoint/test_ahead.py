"""Tensors are made one ahead of the writer, in their order, each byte as it is."""

import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.checkpoint import ahead
from common.checkpoint.ahead import made_ahead, will_need, write_all
from common.checkpoint.archive import MappedFile, write_archive
from common.checkpoint.lazy import LazyTensor


def lazy(produce: Callable[[], Tensor], size: int = 3) -> LazyTensor:
    return LazyTensor((size,), torch.float32, produce)


def test_tensors_come_in_their_order_with_their_checksums() -> None:
    tensors = [torch.randn(3) for _ in range(20)]
    made = list(made_ahead([lazy(lambda tensor=tensor: tensor) for tensor in tensors], checksum=True))
    assert [bytes(each.data) for each in made] == [tensor.numpy().tobytes() for tensor in tensors]
    assert [each.checksum for each in made] == [zlib.crc32(tensor.numpy().tobytes()) for tensor in tensors]
    assert {each.checksum for each in made_ahead([lazy(lambda: torch.ones(3))], checksum=False)} == {0}
    assert not list(made_ahead([], checksum=True))


def test_the_next_is_made_meanwhile_and_no_more() -> None:
    began = [threading.Event() for _ in range(4)]

    def produce(index: int) -> Tensor:
        began[index].set()
        return torch.ones(3)

    made = made_ahead([lazy(lambda index=index: produce(index)) for index in range(4)], checksum=False)
    next(made)
    assert began[1].wait(10) and not began[2].wait(0.2)
    next(made)
    assert began[2].wait(10) and not began[3].wait(0.2)


def test_what_fails_in_the_thread_is_raised() -> None:
    made = made_ahead([lazy(lambda: torch.ones(3)), lazy(lambda: torch.ones(4))], checksum=False)
    assert next(made).shape == (3,)
    with pytest.raises(AssertionError):
        next(made)


def test_a_writer_that_stops_leaves_no_thread() -> None:
    made = made_ahead([lazy(lambda: torch.ones(3)) for _ in range(4)], checksum=False)
    next(made)
    made.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_all_bytes_are_written_in_parts(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "WRITE_BACK_BYTES", 64)
    data = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
    with (tmp_path / "file").open("wb", buffering=0) as stream:
        write_all(stream, data)
        write_all(stream, b"end")
    assert (tmp_path / "file").read_bytes() == data + b"end"


def test_pages_are_asked_for_whatever_the_tensor_is(tmp_path: Path) -> None:
    matrix = torch.randn(300, 700)
    with (tmp_path / "file").open("wb") as stream:
        write_archive(stream, matrix)
    mapped = MappedFile(tmp_path / "file").read()
    for tensor in (mapped, mapped[:, 3:50], mapped[7], mapped.t(), mapped[:0], torch.ones(5), torch.tensor(1.0)):
        assert will_need(tensor) is tensor
    assert torch.equal(mapped, matrix)
