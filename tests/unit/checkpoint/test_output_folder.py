"""A folder is published completely or not at all, whenever the run that writes it is killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.conversion import output_folder
from common.checkpoint.conversion.output_folder import check_disk_space, check_output_folder, write_folder_atomically
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
    """A function that writes a file of each name, with the name as its content."""

    def write_files(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)

    return write_files


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def complete(names: tuple[str, ...]) -> dict[str, str]:
    return {name: name for name in names}


@pytest.mark.parametrize("names", [MEGATRON, HUGGING_FACE])
@pytest.mark.parametrize("made", [True, False])
def test_everything_is_moved_to_its_final_place(tmp_path: Path, names: tuple[str, ...], made: bool) -> None:
    folder = tmp_path / "deep" / "new"
    if made:
        folder.mkdir(parents=True)
    check_output_folder(folder, tmp_path)
    write_folder_atomically(folder, write(names))
    assert content(folder) == complete(names) and not (folder / ".unfinished").exists()


def test_nothing_shows_before_all_is_written(tmp_path: Path) -> None:
    def look(folder: Path) -> None:
        write(MEGATRON)(folder)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [".unfinished", ".unfinished.json"] and folder.parent == tmp_path

    write_folder_atomically(tmp_path, look)


@pytest.mark.parametrize("error", [ZeroDivisionError, KitError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_an_empty_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        write(MEGATRON)(folder)
        raise error

    with pytest.raises(error):
        write_folder_atomically(tmp_path, fail)
    assert not list(tmp_path.iterdir())
    check_output_folder(tmp_path, tmp_path / "source")


def test_a_disk_that_refuses_is_reported(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KitError, match=r"cannot be written: No space left on device: free some space"):
        write_folder_atomically(tmp_path, fail)
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match="file/folder cannot be written: .*Not a directory"):
        write_folder_atomically(tmp_path / "file" / "folder", write(MEGATRON))


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    for name in ("notes.txt", "config.json", "iter_0000100/x"):
        folder = tmp_path / name.partition("/")[0].partition(".")[0]
        write((name,))(folder)
        message = rf"^SAVE_CHECKPOINT_PATH={folder} is not empty, it holds {Path(name).parts[0]}: choose another folder"
        with pytest.raises(KitError, match=message):
            check_output_folder(folder, tmp_path / "source")
        assert content(folder) == complete((name,))


def test_the_folder_that_is_read_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    for name in ("source", "link", "source/../source"):
        with pytest.raises(KitError, match=r"is the input folder: choose another folder"):
            check_output_folder(tmp_path / name, tmp_path / "source")
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match=r"file is a file: choose a folder"):
        check_output_folder(tmp_path / "file", tmp_path / "source")


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """What a run leaves that is killed when all but the tracker is in its final place."""
    folder = tmp_path / "killed"
    (folder / ".unfinished").mkdir(parents=True)
    write(MEGATRON)(folder)
    names = [name for name in MEGATRON if name != TRACKER]
    (folder / TRACKER).rename(folder / ".unfinished" / TRACKER)
    published = {name: [(folder / name).stat().st_ino, len(name), (folder / name).stat().st_mtime_ns] for name in names}
    (folder / ".unfinished.json").write_text(json.dumps({"published": published}))
    return folder


def test_leftovers_of_a_killed_run_are_replaced(killed: Path) -> None:
    check_output_folder(killed, killed.parent / "source")
    write_folder_atomically(killed, write(HUGGING_FACE))
    assert content(killed) == complete(HUGGING_FACE)


@pytest.mark.parametrize(
    "foreign",
    ["notes.txt", "model_mine.safetensors", "iter_0000100/mp_rank_00/model_optim_rng.pt", ".hidden", "release/mine.pt",
     "config.json", "tokenizer.json", "release/mp_rank_01/x.pt", "model.safetensors", TRACKER],
)  # fmt: skip
def test_what_a_killed_run_did_not_write_is_never_removed(killed: Path, foreign: str) -> None:
    (killed / foreign).unlink(missing_ok=True)
    write((foreign,))(killed)
    (killed / foreign).write_text("mine")
    before = content(killed)
    for attempt in (
        lambda: check_output_folder(killed, Path("/source")),
        lambda: write_folder_atomically(killed, write(MEGATRON)),
    ):
        with pytest.raises(KitError, match=f"is not empty, it holds {Path(foreign).parts[0]}: choose"):
            attempt()
    assert content(killed) == before


@pytest.mark.parametrize("mark", [None, "", "[]", '{"published": 3}', '{"published": {"config.json": null}}', "{}"])
def test_a_marker_that_names_no_files_removes_nothing(tmp_path: Path, mark: str | None) -> None:
    write((".unfinished/x", *HUGGING_FACE))(tmp_path)
    if mark is not None:
        (tmp_path / ".unfinished.json").write_text(mark)
    before = content(tmp_path)
    with pytest.raises(KitError, match="is not empty, it holds"):
        write_folder_atomically(tmp_path, write(MEGATRON))
    assert content(tmp_path) == before


def test_a_target_that_cannot_be_written_is_reported_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KitError, match=r"=/proc/target cannot be written: /proc/\S+: "):
        check_output_folder(Path("/proc/target"), tmp_path)
    check_disk_space(tmp_path / "a" / "b", 0)
    message = r"b cannot be written: No space left on device \(.* GB are free, and 1000000000.00 GB are needed\): "
    with pytest.raises(KitError, match=message):
        check_disk_space(tmp_path / "a" / "b", 10**18)


def test_the_space_that_a_killed_run_takes_counts_as_free(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_folder, "free_bytes", lambda path: 0)
    left = sum(path.stat().st_size for path in killed.rglob("*") if path.is_file())
    check_disk_space(killed, left)
    with pytest.raises(KitError, match="No space left"):
        check_disk_space(killed, left + 1)


def test_everything_is_on_the_disk_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    synced, renamed = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        done.append(f"sync {str(Path(f'/proc/self/fd/{handle}').readlink()).removeprefix(str(tmp_path))}")
        synced(handle)

    def note_rename(path: Path, target: Path) -> Path:
        done.append(f"rename {target.relative_to(tmp_path)}")
        return renamed(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    write_folder_atomically(tmp_path / "a" / "b", write(MEGATRON))
    first = done.index("rename a/b/release")
    folders = ("release", "release/mp_rank_00", "release/mp_rank_01")
    assert all(f"sync /a/b/.unfinished/{name}" in done[:first] for name in (*MEGATRON, *folders))
    assert "sync " in done[:first] and "sync /a" in done[:first]  # the names of the new folders
    last = [place for place in done if place.startswith("rename") or place == "sync /a/b"][-4:]
    assert last == ["rename a/b/config.json", "sync /a/b", f"rename a/b/{TRACKER}", "sync /a/b"]


def test_a_run_killed_at_any_step_leaves_nothing_that_looks_finished_and_can_be_repeated() -> None:
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kills, twice = map(int, done.stdout.split())
    assert kills > 20 and twice > 20


def attempt(folder: Path, names: tuple[str, ...], last_step: int | None) -> bool:
    """Whether a process wrote `folder` before it was killed at change number `last_step` of the file system."""
    process = os.fork()
    if not process:
        steps = iter(range(10**9))

        def kill(event: str, _: Any) -> None:
            if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open") and next(steps) == last_step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        check_output_folder(folder, Path("/nowhere"))
        write_folder_atomically(folder, write(names))
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or status == 0, (folder, last_step)
    return status == 0


def check_folder(folder: Path, names: tuple[str, ...]) -> None:
    """Fails if the file that marks `folder` as finished is there before the rest."""
    there = content(folder) if folder.is_dir() else {}
    assert TRACKER not in there or complete(names).items() <= there.items(), there
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
            check_folder(folder, names)
            for again in range(step % 9, 10**9, 9):
                if attempt(folder, names, again):
                    break
                twice += 1
                check_folder(folder, names)
            assert content(folder) == complete(names) and not (folder / ".unfinished").exists()
    return kills, twice


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(*kill_everywhere(Path(place)))
