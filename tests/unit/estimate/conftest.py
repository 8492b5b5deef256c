"""Fixtures of the tests of the estimate."""

import pytest

from common.engine.versions import ENGINES


@pytest.fixture(autouse=True)
def _newest_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that the figures were measured with are refused by some older versions of Megatron-Core."""
    monkeypatch.setattr("common.training.planning.compatibility.installed_engine", lambda: ENGINES[-1])
