"""Host memory for a device's copies: exactly the requested size, pinned or refused."""

import mmap
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import KitError
from common.training.state import host_memory
from common.training.state.host_memory import BLOCK_BYTES, host_buffer, num_threads


def cudart(code: int, calls: list[tuple[int, int, int]]) -> Any:
    def register(address: int, size: int, flags: int) -> int:
        calls.append((address, size, flags))
        return code

    return lambda: SimpleNamespace(cudaHostRegister=register, cudaGetErrorString=lambda found: f"error {found}")


def buffer_of(size: int, *, pinned: bool = False) -> torch.Tensor:
    return host_buffer(size, "SETTING=value", "do without", pinned=pinned)


def kernel_flags(buffer: torch.Tensor) -> tuple[int, set[str]]:
    """(KiB of memory that the buffer's mapping has, the kernel's flags of it)."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        begin, _, end = line.split(" ")[0].partition("-")
        if end:
            found = {"inside": "yes"} if int(begin, 16) <= buffer.data_ptr() < int(end, 16) else {}
        elif found:
            name, _, value = line.partition(":")
            found[name] = value
            if name == "VmFlags":
                return int(found["Rss"].split()[0]), set(value.split())
    raise AssertionError("no mapping of the buffer")


def test_all_of_a_buffer_is_pinned_by_cuda_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(torch.cuda, "cudart", cudart(0, calls))
    buffer = buffer_of(4097, pinned=True)
    assert buffer.nbytes == 4097 and not buffer.any()
    assert calls == [(buffer.data_ptr(), 4097, 1)]
    assert calls[0][0] % 4096 == 0  # two buffers share no page
    assert buffer_of(12).nbytes == 12 and len(calls) == 1


def test_every_page_is_there_before_it_is_pinned_and_no_fork_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    size, found = 2 * BLOCK_BYTES + 5000, []

    def pin(buffer: torch.Tensor, setting: str, remedy: str) -> None:
        found.append(kernel_flags(buffer))

    monkeypatch.setattr(host_memory, "_pin", pin)
    buffer = buffer_of(size, pinned=True)
    ((kib, flags),) = found
    assert 1024 * kib >= size and {"dc", "hg"} <= flags  # do not copy on fork; huge pages
    assert not buffer.any()


@pytest.mark.parametrize("refused", [AttributeError, OSError])
def test_a_kernel_that_takes_no_advice_gives_the_same_memory(
    refused: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory(mmap.mmap):
        def madvise(self, *given: int) -> None:
            raise refused("no such advice")

    monkeypatch.setattr(host_memory.mmap, "mmap", Memory)
    assert buffer_of(10000).eq(0).all()


def test_the_ranks_of_a_node_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)))
    found = []
    for ranks in ("1", "4", "8", "48"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        found.append(num_threads())
    assert found == [16, 6, 3, 1]


def test_memory_that_cuda_does_not_pin_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", cudart(2, []))
    text = r"SETTING=value: CUDA does not pin 0\.1 GiB .* \(error 2\): start the container .*, do without"
    with pytest.raises(KitError, match=text):
        buffer_of(1 << 27, pinned=True)


def test_memory_that_is_not_there_is_refused() -> None:
    with pytest.raises(KitError, match=re.escape("SETTING=value: no 1073741824.0 GiB of memory (")):
        buffer_of(1 << 60)
