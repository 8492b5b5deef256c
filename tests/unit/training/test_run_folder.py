"""A run's folder: leftovers of a killed run removed, checkpoints published completely, errors of the disk raised."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.training.checkpointing import run_folder
from common.training.checkpointing.folder_lock import LOCK_FILE
from common.training.checkpointing.run_folder import RunFolder

NEEDED_BYTES = 1000


@pytest.fixture(autouse=True)
def size_of_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "bytes_of_checkpoint", lambda plan: NEEDED_BYTES)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def plan(folder: Path, model: Path) -> Any:
    settings = SimpleNamespace(save_checkpoint_path=str(folder), keep_checkpoints=3, nnodes=1)
    return SimpleNamespace(settings=settings, start=SimpleNamespace(model_folder=model))


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for name in ("iter_0000005", "iter_0000010.partial", "iter_0000003.removing_17", "iter_0000004.removing", "mine"):
        (run / name).mkdir(parents=True)
        (run / name / "file").touch()
    (run / "latest_checkpointed_iteration.txt.partial").touch()
    with caplog.at_level("INFO", "kit"):
        RunFolder(plan(run, model))
    assert sorted(path.name for path in run.iterdir()) == [LOCK_FILE, "iter_0000005", "mine"]
    for name in ("iter_0000010.partial", "iter_0000003.removing_17", "latest_checkpointed_iteration.txt.partial"):
        assert name in caplog.text


def test_a_checkpoint_replaces_an_older_one_of_the_same_name(tmp_path: Path, model: Path) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    final = folder.path / "iter_0000005"
    for content in ("old", "new"):
        partial = folder.begin(final)
        assert partial.name == "iter_0000005.partial" and not any(partial.iterdir())
        (partial / content).touch()
        folder.publish(partial, final)
        assert [path.name for path in final.iterdir()] == [content] and not partial.exists()
    assert len(list(folder.path.glob("*.removing_*"))) == 1
    folder.remove_replaced()
    assert sorted(path.name for path in folder.path.iterdir()) == [LOCK_FILE, "config.json", "iter_0000005"]


def test_leftovers_of_a_failed_save_are_no_part_of_the_next(tmp_path: Path, model: Path) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    (folder.begin(folder.path / "iter_0000005") / "half").touch()
    assert not any(folder.begin(folder.path / "iter_0000005").iterdir())


def test_a_failed_removal_is_retried(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    checkpoint = folder.path / "iter_0000005"
    checkpoint.mkdir()

    def refuse(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        with pytest.raises(OSError, match="busy"):
            folder.remove(checkpoint)
    assert not checkpoint.exists() and list(folder.path.glob("*.removing_*"))
    folder.remove_replaced()
    assert not list(folder.path.glob("*.removing_*"))


def test_the_models_files_survive_the_folder_that_they_came_from(tmp_path: Path, model: Path) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    shutil.rmtree(model)
    shutil.rmtree(folder.path)  # by whomever; the disk is there
    folder.begin(folder.path / "iter_0000005")
    assert (folder.path / "config.json").read_text() == "{}"


def test_too_little_space_is_reported_before_a_checkpoint_is_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    folder.check_disk()
    monkeypatch.setattr(run_folder, "free_bytes", lambda path: NEEDED_BYTES - 1)
    with pytest.raises(OSError, match=r"0\.00 GB free, and a checkpoint takes 0\.00 GB") as raised:
        folder.check_disk()
    assert raised.value.errno == errno.ENOSPC
    assert sorted(path.name for path in folder.path.iterdir()) == [LOCK_FILE]  # the file of the try is gone


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "kit", str(path)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here: no right to")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=False)


def test_a_full_disk_and_another_disk_in_its_place_are_reported(disk: Path, model: Path) -> None:
    folder = RunFolder(plan(disk / "run", model))
    folder.check_disk()
    with (disk / "other").open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(b"x" * 4096)
    with pytest.raises(OSError, match="No space left") as raised:
        folder.check_disk()
    assert raised.value.errno == errno.ENOSPC
    assert sorted(path.name for path in folder.path.iterdir()) == [LOCK_FILE]
    (disk / "other").unlink()
    folder.check_disk()
    os.close(folder._lock)
    subprocess.run(["umount", "-l", str(disk)], check=True)
    with pytest.raises(OSError, match="it is on another disk than when the run began: is it mounted"):
        folder.check_disk()
    assert not (disk / "run").exists()
