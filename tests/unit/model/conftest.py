"""Stubs of packages that need a GPU."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

STUBS = Path(__file__).parents[2] / "stubs"


def stub(monkeypatch: pytest.MonkeyPatch, folder: str, module: str) -> Iterator[Any]:
    """`module` of a stub, whose package is unloaded afterwards."""
    monkeypatch.syspath_prepend(str(STUBS / folder))
    yield importlib.import_module(module)
    package = module.split(".")[0]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """QuACK's gemm_interface."""
    yield from stub(monkeypatch, "quack", "quack.gemm_interface")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Makes torch deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def flash_4(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """FlashAttention 4's interface."""
    yield from stub(monkeypatch, "flash_attn_4", "flash_attn.cute.interface")
