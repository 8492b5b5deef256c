"""A disk that is full, read-only or gone: no run fails, complete checkpoints stay, and what is due is saved."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import steps
from tests.distributed.user import ENDLESS, Run, step3, step3_forked, wait_for

SIZE_MB = 20  # a checkpoint of the tiny model is 3.3 MB, of which 2.9 are known beforehand
REASON = "file systems cannot be mounted here: no right to"


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={SIZE_MB}m", "kit", folder)
    except subprocess.CalledProcessError:
        pytest.skip(REASON)
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def settings(work: Path, folder: Path, **more: Any) -> dict[str, Any]:
    paths = {"DATASET_PATH": work / "pretrain", "LOAD_CHECKPOINT_PATH": work / "start"}
    sizes = {"SAVE_CHECKPOINT_PATH": folder, "GPUS": 2, "EVAL_INTERVAL": 0, "TRAIN_ITERS": ENDLESS}
    return {**paths, **sizes, "SAVE_INTERVAL": 5, "LOG_INTERVAL": 5, **more}


def fill(folder: Path, leave_kb: int = 0) -> Path:
    """A file that takes all free space of `folder` except `leave_kb`, whatever else is written meanwhile."""
    path = folder.parent / "fill" if folder.is_file() else folder / "fill"
    with path.open("wb", buffering=0) as stream:
        with suppress(OSError):
            while stream.write(bytes(4096)):
                pass
        stream.truncate(stream.tell() - 1024 * leave_kb)
    return path


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_a_full_disk_is_waited_for_while_training_continues(work: Path, disk: Path, ckpt_format: str) -> None:
    own = {"HF_MODEL_PATH": work / "qwen", "LOAD_CHECKPOINT_PATH": ""} if ckpt_format == "torch" else {}
    run = Run(settings(work, disk / "run", CKPT_FORMAT=ckpt_format, **own), disk.parent / "log")
    run.wait_for("saved " + str(disk / "run" / "iter_0000005"))
    filler = fill(disk)
    run.wait_for("NOT SAVED to ")
    before = run.tracker()
    assert "No space left on device" in run.text()
    logged = len(steps(run.text()))
    wait_for(lambda: len(steps(run.text())) >= logged + 3)  # training continues
    assert run.tracker() == before and not list((disk / "run").glob("*.partial"))
    filler.unlink()
    wait_for(lambda: run.tracker() > before)
    run.process.send_signal(signal.SIGTERM)
    log = run.end(75)
    assert "Traceback" not in log
    more = {"TRAIN_ITERS": run.tracker() + 1, "LOG_INTERVAL": 1}
    again = step3_forked(settings(work, disk / "run", CKPT_FORMAT=ckpt_format, **own, **more))
    assert len(steps(again)) == 1


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before(
    work: Path, disk: Path, asynchronous: str
) -> None:
    run = Run(settings(work, disk / "run", ASYNC_SAVE=asynchronous), disk.parent / "log")
    run.wait_for("saved " + str(disk / "run" / "iter_0000005"))
    fill(disk, leave_kb=3050)
    run.wait_for("NOT SAVED to ")
    before = run.tracker()
    assert all((disk / "run" / f"iter_{before:07d}" / name).is_file() for name in (".metadata", "common.pt"))
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("stop requested")
    subprocess.run(["mount", "-o", f"remount,size={8 * SIZE_MB}m", disk], check=True)
    log = run.end(75, 60)
    assert run.tracker() > before and "Traceback" not in log


def test_a_disk_that_becomes_read_only_or_disappears_is_waited_for(work: Path, disk: Path) -> None:
    run = Run(settings(work, disk / "run"), disk.parent / "log")
    run.wait_for("saved " + str(disk / "run" / "iter_0000005"))
    mount("-o", "remount,bind,ro", disk)
    run.wait_for("Read-only file system")
    before = run.tracker()
    mount("-o", "remount,bind,rw", disk)
    wait_for(lambda: run.tracker() > before)
    # Another file system in its place, empty, as a mount point is when its disk is gone.
    mount("-t", "tmpfs", "-o", f"size={SIZE_MB}m", "other", disk)
    run.wait_for("it is on another disk than when the run began: is it mounted?")
    assert not list(disk.iterdir())
    subprocess.run(["umount", disk], check=True)
    before = run.tracker()
    wait_for(lambda: run.tracker() > before)
    run.process.send_signal(signal.SIGTERM)
    assert "Traceback" not in run.end(75)


def test_a_removed_folder_is_recreated_with_the_models_files(work: Path, tmp_path: Path) -> None:
    run = Run(settings(work, tmp_path / "run"), tmp_path / "log")
    run.wait_for("saved " + str(tmp_path / "run" / "iter_0000005"))
    subprocess.run(["rm", "-rf", tmp_path / "run"], check=True)
    wait_for(lambda: (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists())
    run.process.send_signal(signal.SIGTERM)
    run.end(75)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == (work / "start" / name).read_bytes()


def test_a_disk_without_room_or_rights_is_refused_before_anything_starts(work: Path, disk: Path) -> None:
    fill(disk, leave_kb=500)
    log = step3(settings(work, disk / "run"), disk.parent / "log", 2)
    assert f"SAVE_CHECKPOINT_PATH={disk / 'run'} has 0.00 GB free, and a checkpoint of this run takes " in log
    mount("-o", "remount,bind,ro", disk)
    log = Run(settings(work, disk / "run"), disk.parent / "log", ("--check",)).end(2)
    assert f"SAVE_CHECKPOINT_PATH={disk / 'run'} cannot be written: " in log and "Read-only file system" in log


def test_leftovers_of_a_killed_run_are_removed(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "iter_0000007.partial").mkdir(parents=True)
    (folder / "iter_0000007.partial" / "__0_0.distcp").write_bytes(b"half")
    log = step3_forked(settings(work, folder, TRAIN_ITERS=1))
    assert "removed leftovers of a killed run: iter_0000007.partial" in log
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000001"]


def test_a_log_on_a_full_disk_does_not_end_the_run(work: Path, disk: Path, tmp_path: Path) -> None:
    run = Run(settings(work, tmp_path / "run", TRAIN_ITERS=60), disk / "log")
    run.wait_for("iteration 5/")
    fill(disk)
    assert run.process.wait(120) == 0 and (tmp_path / "run" / "iter_0000060").is_dir()
