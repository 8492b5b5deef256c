"""Host memory for a device's copies: exactly the requested size, pinned or refused."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import KitError
from common.training.state.host_memory import offload_buffer


def cudart(code: int, calls: list[tuple[int, int, int]]) -> Any:
    def register(address: int, size: int, flags: int) -> int:
        calls.append((address, size, flags))
        return code

    return lambda: SimpleNamespace(cudaHostRegister=register, cudaGetErrorString=lambda found: f"error {found}")


def test_all_of_a_buffer_is_pinned_by_cuda_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(torch.cuda, "cudart", cudart(0, calls))
    buffer = offload_buffer(4097, pinned=True)
    assert len(buffer) == 4097 and not any(buffer[:])
    assert calls == [(torch.frombuffer(buffer, dtype=torch.uint8).data_ptr(), 4097, 1)]
    assert calls[0][0] % 4096 == 0  # two buffers share no page
    assert len(offload_buffer(12, pinned=False)) == 12 and len(calls) == 1


def test_memory_that_cuda_does_not_pin_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", cudart(2, []))
    with pytest.raises(KitError, match=r"does not pin 0\.5 GiB of the host's memory \(error 2\): start the container"):
        offload_buffer(1 << 29, pinned=True)


def test_memory_that_is_not_there_is_refused() -> None:
    with pytest.raises(KitError, match=re.escape("OPTIMIZER_STATE=cpu: no 1073741824.0 GiB of memory (")):
        offload_buffer(1 << 60, pinned=False)
