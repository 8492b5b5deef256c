"""The hash of a checkpoint's weights: the same in another folder, another after any change."""

import shutil
from pathlib import Path

import pytest

from common.checkpoint.formats.identity import weights_hash


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(bytes(range(256)) * 4096)
    (folder / "__1_0.distcp").write_bytes(b"b" * 10)
    (folder / ".metadata").write_bytes(b"m")
    return folder


def test_a_copy_and_a_file_that_holds_no_weights_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    before = weights_hash(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    (checkpoint / "note.txt").write_text("a note", encoding="utf-8")
    assert weights_hash(checkpoint) == before == weights_hash(tmp_path / "copy")


@pytest.mark.parametrize("change", ["first byte", "last byte", "size", "name", "fewer files"])
def test_a_change_shows(checkpoint: Path, change: str) -> None:
    before, file = weights_hash(checkpoint), checkpoint / "__0_0.distcp"
    content = file.read_bytes()
    if change == "first byte":
        file.write_bytes(b"x" + content[1:])
    elif change == "last byte":
        file.write_bytes(content[:-1] + b"x")
    elif change == "size":
        file.write_bytes(content + b"\0")
    elif change == "name":
        file.rename(checkpoint / "__2_0.distcp")
    else:
        file.unlink()
    assert weights_hash(checkpoint) != before
