"""Whether a folder can be written to: real folders, a full disk, a read-only one, and a user without rights."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from common.errors import KitError
from common.folders import check_writable, existing_part, free_bytes, named_in_utf8

ROOT = Path(__file__).parents[2]
NOBODY = 65534


def test_a_writable_folder_is_not_changed(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "X")
    assert list(tmp_path.iterdir()) == []
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_a_file_that_blocks_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert existing_part(tmp_path / "file" / "b") == tmp_path / "file"
    with pytest.raises(KitError, match=rf"^OUT=x cannot be written: {tmp_path}/file: Not a directory: check the path"):
        check_writable(tmp_path / "file" / "b", "OUT=x")


def test_a_dangling_link_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(KitError, match="link: Not a directory"):
        check_writable(tmp_path / "link" / "a", "X")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "x", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here: no right to")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=False)


def test_a_full_disk_and_a_read_only_one_have_their_remedies(small_disk: Path) -> None:
    (small_disk / "a").write_bytes(bytes(free_bytes(small_disk)))
    with pytest.raises(KitError, match="^X cannot be written: No space left on device: free some space"):
        check_writable(small_disk, "X")
    assert [path.name for path in small_disk.iterdir()] == ["a"]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(KitError, match="^X cannot be written: .*: Read-only file system: remount it read-write"):
        check_writable(small_disk, "X")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a user without rights needs root")
def test_a_folder_of_another_user_is_refused_with_its_remedy(tmp_path: Path) -> None:
    program = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom common import errors, folders\n"
        f"os.setuid({NOBODY})\n"
        "errors.run(lambda: folders.check_writable(Path('/root/a'), 'X'))\n"
    )
    Path("/root").stat()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "Permission denied: ask its owner for access (chmod, chown)" in done.stderr, done


@pytest.mark.parametrize(("name", "kept"), [(b"model", True), ("模型".encode(), True), ("模型".encode("gbk"), False)])
def test_a_folder_whose_name_is_not_utf8_has_another_that_rust_opens(tmp_path: Path, name: bytes, kept: bool) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    with named_in_utf8(folder) as readable:
        assert (readable == folder) == kept and readable.samefile(folder)
        assert Tokenizer.from_file(str(readable / "tokenizer.json")).get_vocab_size() == 0
    assert kept or not readable.exists()
