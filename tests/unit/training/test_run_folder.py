"""A run's folder: one writer, named where another asks; nothing left of a killed run; a disk's trouble told."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import KitError
from common.training.state import run_folder
from common.training.state.run_folder import LOCK_FILE, RunFolder, check_lock, take_lock

ROOT = Path(__file__).parents[3]
NEEDED_BYTES = 1000
HOLD = """
import sys
from pathlib import Path
from common.training.state.run_folder import take_lock
take_lock(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


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


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another run, as far as its lock on `tmp_path / "run"` goes."""
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_by_name_until_the_first_one_has_died(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    named = rf"another run \(process {holder.pid} on {socket.gethostname()}, since .*\): wait for it, stop it, or"
    with pytest.raises(KitError, match=named):
        take_lock(tmp_path / "run", wait_s=0)
    (tmp_path / "run" / LOCK_FILE).write_text("{}")
    with pytest.raises(KitError, match=r"another run \(unknown\)"):
        take_lock(tmp_path / "run", wait_s=0)
    holder.kill()
    handle = take_lock(tmp_path / "run", wait_s=10)
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    os.close(handle)


def test_looking_for_a_lock_makes_nothing_and_holds_nothing(tmp_path: Path) -> None:
    check_lock(tmp_path / "nowhere")
    check_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK_FILE).touch()
    check_lock(tmp_path)
    os.close(take_lock(tmp_path, wait_s=0))


def test_without_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    os.close(take_lock(tmp_path))
    assert "the file system does not support locks (No locks available): nothing keeps a second run out" in caplog.text


def test_what_a_killed_run_left_is_removed_and_nothing_else(
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


def test_a_checkpoint_takes_the_place_of_an_older_one_of_its_name(tmp_path: Path, model: Path) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    final = folder.path / "iter_0000005"
    for content in ("old", "new"):
        partial = folder.begin(final)
        assert partial.name == "iter_0000005.partial" and not any(partial.iterdir())
        (partial / content).touch()
        folder.publish(partial, final)
        assert [path.name for path in final.iterdir()] == [content] and not partial.exists()
    assert len(list(folder.path.glob("*.removing_*"))) == 1
    folder.remove_asides()
    assert sorted(path.name for path in folder.path.iterdir()) == [LOCK_FILE, "config.json", "iter_0000005"]


def test_what_a_failed_save_left_is_no_part_of_the_next(tmp_path: Path, model: Path) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    (folder.begin(folder.path / "iter_0000005") / "half").touch()
    assert not any(folder.begin(folder.path / "iter_0000005").iterdir())


def test_a_removal_that_failed_is_made_up_for(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    folder.remove_asides()
    assert not list(folder.path.glob("*.removing_*"))


def test_the_models_files_survive_the_folder_that_they_came_from(tmp_path: Path, model: Path) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    shutil.rmtree(model)
    shutil.rmtree(folder.path)  # by whomever; the disk is there
    folder.begin(folder.path / "iter_0000005")
    assert (folder.path / "config.json").read_text() == "{}"


def test_too_little_room_is_told_before_a_checkpoint_is_begun(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(plan(tmp_path / "run", model))
    folder.probe()
    monkeypatch.setattr(run_folder, "free_bytes", lambda path: NEEDED_BYTES - 1)
    with pytest.raises(OSError, match=r"0\.00 GB are free, and a checkpoint takes 0\.00 GB") as told:
        folder.probe()
    assert told.value.errno == errno.ENOSPC
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


def test_a_full_disk_and_another_disk_in_its_place_are_told(disk: Path, model: Path) -> None:
    folder = RunFolder(plan(disk / "run", model))
    folder.probe()
    with (disk / "other").open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(b"x" * 4096)
    with pytest.raises(OSError, match="No space left") as told:
        folder.probe()
    assert told.value.errno == errno.ENOSPC
    assert sorted(path.name for path in folder.path.iterdir()) == [LOCK_FILE]
    (disk / "other").unlink()
    folder.probe()
    os.close(folder._lock)
    subprocess.run(["umount", "-l", str(disk)], check=True)
    with pytest.raises(OSError, match="it is on another disk than when the run began: is it mounted"):
        folder.probe()
    assert not (disk / "run").exists()
