"""QuACK's stand-in, in the place of a package that needs a GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STAND_INS = Path(__file__).parents[2] / "stand_ins"


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its gemm_interface."""
    monkeypatch.syspath_prepend(str(STAND_INS / "quack"))
    from quack import gemm_interface

    yield gemm_interface
    for name in [name for name in sys.modules if name.split(".")[0] == "quack"]:
        del sys.modules[name]
