"""Whether the installed Megatron-Core is what is imported, and has the numpy that it needs."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.engine import installation
from common.engine.base import Engine
from common.engine.versions import ENGINES
from common.errors import KitError
from tests.unit.engine.installed import install


@pytest.mark.parametrize(("text", "numpy_version"), [("0.14.0", "1.26.4"), ("0.16.1", "2.2.6")])
def test_what_fits_is_accepted(text: str, numpy_version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, text, monkeypatch)
    install(tmp_path, numpy_version, monkeypatch, "numpy")
    installation.check_installed()


def test_numpy_2_is_refused_before_megatron_core_0_16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "0.14.0", monkeypatch)
    install(tmp_path, "2.2.6", monkeypatch, "numpy")
    with pytest.raises(
        KitError, match="^numpy 2.2.6 is installed, and megatron-core 0.14 needs numpy before 2: pip inst"
    ):
        installation.check_installed()


@pytest.mark.parametrize("packaged", [True, False], ids=["with __init__.py", "a namespace"])
def test_a_checkout_that_shadows_the_installed_package_is_refused(
    packaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = installation.check_origin()
    assert installed.parts[-3:] == ("megatron", "core", "__init__.py")
    core = tmp_path / "Megatron-LM" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('it was run')\n")
    if packaged:
        (core.parent / "__init__.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "Megatron-LM")])
    if not packaged:
        assert installation.check_origin() == installed  # behind the package it is not what is loaded
    monkeypatch.setattr(sys, "path", [str(tmp_path / "Megatron-LM"), *sys.path])
    with pytest.raises(KitError, match=f"loads {core}/__init__.py, not the installed .* from PYTHONPATH"):
        installation.check_origin()


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_loggers_that_warn_of_what_no_user_can_change_are_quiet(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(installation, "installed_engine", lambda: engine)
    monkeypatch.setattr(installation, "check_installed", lambda: None)
    installation.prepare(SimpleNamespace(prepare=lambda: None))
    assert logger.level == (logging.ERROR if engine.version == (0, 19) else logging.WARNING)
