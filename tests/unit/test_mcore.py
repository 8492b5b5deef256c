"""Which Megatron-Core is installed, and what follows from it; installed versions are real folders on sys.path."""

import re
import sys
from pathlib import Path

import pytest

from common import mcore
from common.errors import KitError

ROOT = Path(__file__).parents[2]


def install(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `version` the one that Python's own package metadata finds."""
    metadata = folder / f"megatron_core-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(folder)])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.11.0", (0, 11)),
        ("0.12.3", (0, 12)),
        ("0.14.0rc7+a4306f7", (0, 14)),
        ("0.16.1", (0, 16)),
    ],
)
def test_a_supported_version_is_read(
    text: str, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    assert mcore.version() == expected


@pytest.mark.parametrize("text", ["0.10.0", "0.17.0", "1.0.0", "0.9.0"])
def test_any_other_version_is_refused_with_the_range(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    with pytest.raises(KitError, match=f"megatron-core {text} is installed.*0.11 to 0.16: pip install"):
        mcore.version()


def test_a_missing_megatron_core_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(KitError, match="megatron-core is not installed: pip install megatron-core=="):
        mcore.version()


def test_the_range_that_is_told_is_the_range_that_is_checked() -> None:
    oldest, newest = (f"{major}.{minor}" for major, minor in (mcore.OLDEST, mcore.NEWEST))
    assert f"{oldest} to {newest}" == mcore.RANGE


def test_every_locked_version_is_supported() -> None:
    files = [*(ROOT / "requirements").glob("*.txt"), *(ROOT / "docker").glob("*.Dockerfile")]
    locked = {text for path in files for text in re.findall(r"megatron-core==(\d+)\.(\d+)", path.read_text())}
    assert len(locked) > 1
    assert all(mcore.OLDEST <= (int(major), int(minor)) <= mcore.NEWEST for major, minor in locked)


@pytest.mark.parametrize(
    "text, layout",
    [
        ("0.11.0", "dp_zero_gather_scatter"),
        ("0.12.0", "dp_zero_gather_scatter"),
        ("0.13.0", "fully_sharded_model_space"),
        ("0.14.0", "fully_sharded_model_space"),
        ("0.15.0", "fully_reshardable"),
        ("0.16.1", "fully_reshardable"),
    ],
)
def test_the_optimizers_layout_is_one_that_the_version_can_load(
    text: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    assert mcore.optimizer_sharding() == layout
