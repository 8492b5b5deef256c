"""A folder is there as a whole or not at all, whenever the run that writes it is killed."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.target import check_target, write_whole
from common.errors import KitError

ROOT = Path(__file__).parents[3]
TRACKER = "latest_checkpointed_iteration.txt"
MEGATRON = (
    "config.json",
    "tokenizer.json",
    "release/mp_rank_00/model_optim_rng.pt",
    "release/mp_rank_01/x.pt",
    TRACKER,
)
HUGGING_FACE = (
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)


def write(names: tuple[str, ...]) -> Callable[[Path], None]:
    """What writes a file of each name, its own name in it."""

    def write_files(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)

    return write_files


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def whole(names: tuple[str, ...]) -> dict[str, str]:
    return {name: name for name in names}


@pytest.mark.parametrize("names", [MEGATRON, HUGGING_FACE])
@pytest.mark.parametrize("made", [True, False])
def test_everything_gets_its_final_place(tmp_path: Path, names: tuple[str, ...], made: bool) -> None:
    folder = tmp_path / "deep" / "new"
    if made:
        folder.mkdir(parents=True)
    check_target(folder, tmp_path)
    write_whole(folder, write(names))
    assert content(folder) == whole(names) and not (folder / ".unfinished").exists()


def test_nothing_shows_before_all_is_written(tmp_path: Path) -> None:
    def look(folder: Path) -> None:
        write(MEGATRON)(folder)
        assert [path.name for path in tmp_path.iterdir()] == [".unfinished"] and folder.parent == tmp_path

    write_whole(tmp_path, look)


@pytest.mark.parametrize("error", [ZeroDivisionError, KitError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_an_empty_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        write(MEGATRON)(folder)
        raise error

    with pytest.raises(error):
        write_whole(tmp_path, fail)
    assert not list(tmp_path.iterdir())
    check_target(tmp_path, tmp_path / "source")


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KitError, match=r"cannot be written: \[Errno 28\] No space left on device: mend it and run the"):
        write_whole(tmp_path, fail)
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match="file/folder cannot be written: .*Not a directory"):
        write_whole(tmp_path / "file" / "folder", write(MEGATRON))


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    for name in ("notes.txt", "config.json", "iter_0000100/x"):
        folder = tmp_path / name.partition("/")[0].partition(".")[0]
        write((name,))(folder)
        told = rf"^SAVE_CHECKPOINT_PATH={folder} is not empty, it holds {Path(name).parts[0]}: choose another folder"
        with pytest.raises(KitError, match=told):
            check_target(folder, tmp_path / "source")
        assert content(folder) == whole((name,))


def test_the_folder_that_is_read_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    for name in ("source", "link", "source/../source"):
        with pytest.raises(KitError, match=r"is the folder that is read: choose another folder"):
            check_target(tmp_path / name, tmp_path / "source")
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match=r"file is a file: choose a folder"):
        check_target(tmp_path / "file", tmp_path / "source")


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "model_mine.safetensors", "iter_0000100/mp_rank_00/model_optim_rng.pt", ".hidden"]
)
def test_what_a_killed_run_cannot_have_left_is_never_removed(tmp_path: Path, foreign: str) -> None:
    names = (".unfinished/config.json", "tokenizer.json", foreign, TRACKER)
    write(names)(tmp_path)
    with pytest.raises(KitError, match=f"is not empty, it holds {Path(foreign).parts[0]}: choose"):
        check_target(tmp_path, tmp_path / "source")
    assert content(tmp_path) == whole(names)


def test_remains_of_another_layout_do_not_mix_with_what_is_written(tmp_path: Path) -> None:
    write((".unfinished/x", "release/mp_rank_00_001/model_optim_rng.pt", "model-00003-of-00003.safetensors"))(tmp_path)
    check_target(tmp_path, tmp_path / "source")
    write_whole(tmp_path, write(MEGATRON))
    assert content(tmp_path) == whole(MEGATRON)


def test_a_run_killed_at_any_step_leaves_nothing_that_looks_finished_and_can_be_repeated() -> None:
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kills, twice = map(int, done.stdout.split())
    assert kills > 20 and twice > 20


def attempt(folder: Path, names: tuple[str, ...], last_step: int | None) -> bool:
    """Whether a process wrote `folder` before SIGKILL met it at its change number `last_step` of the file system."""
    process = os.fork()
    if not process:
        steps = iter(range(10**9))

        def kill(event: str, _: Any) -> None:
            if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open") and next(steps) == last_step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        check_target(folder, Path("/nowhere"))
        write_whole(folder, write(names))
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or status == 0, (folder, last_step)
    return status == 0


def look(folder: Path, names: tuple[str, ...]) -> None:
    """Fails if what tells that `folder` is finished is there before the rest."""
    there = content(folder) if folder.is_dir() else {}
    assert TRACKER not in there or whole(names).items() <= there.items(), there
    assert "config.json" not in there or set(names) - {TRACKER} <= set(there), there
    assert all((folder / name).read_text() == name for name in names if (folder / name).is_file())


def kill_everywhere(root: Path) -> tuple[int, int]:
    """Numbers of runs that were killed on an empty folder, and on what such a run had left."""
    kills = twice = 0
    for kind, names in (("megatron", MEGATRON), ("hf", HUGGING_FACE)):
        for step in range(10**9):
            folder = root / f"{kind}{step}"
            if attempt(folder, names, step):
                break
            kills += 1
            look(folder, names)
            for again in range(step % 9, 10**9, 9):
                if attempt(folder, names, again):
                    break
                twice += 1
                look(folder, names)
            assert content(folder) == whole(names) and not (folder / ".unfinished").exists()
    return kills, twice


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(*kill_everywhere(Path(place)))
