"""Which steps and ranks are profiled, and when the memory's picture is taken; torch.cuda's part is a stand-in."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import KitError
from common.training.loop.memory import explain_out_of_memory
from common.training.loop.profiling import Profiler, record_memory
from common.training.planning.plan import Progress
from common.training.settings import TrainSettings


def plan(folder: Path, done: int = 0, **changes: Any) -> Any:
    given = {"save_checkpoint_path": str(folder), "dataset_path": "-", "train_iters": 50, "gpus": 4, **changes}
    return SimpleNamespace(
        settings=TrainSettings(**given), progress=Progress(done), platform=SimpleNamespace(device="cpu"),
        start=SimpleNamespace(checkpoint=None, model_folder=folder),
    )  # fmt: skip


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What torch would have written."""
    found: list[Path] = []

    def dump(path: str) -> None:
        found.append(Path(path))
        Path(path).write_bytes(b"memory")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return found


@pytest.mark.parametrize(
    ("done", "profile", "rank", "begin"),
    [
        (0, "10-12", 0, 9),  # a step of warm-up
        (0, "1-2", 0, 1),  # there is none before it
        (9, "10", 0, 10),  # nor in a run that resumes there
        (10, "10-12", 0, 11),
        (12, "10-12", 0, 0),
        (0, "10-12", 1, 0),
        (0, None, 0, 0),
    ],
)
def test_a_trace_begins_a_step_early_where_it_can(
    tmp_path: Path, done: int, profile: str | None, rank: int, begin: int
) -> None:
    assert Profiler(plan(tmp_path, done, profile=profile, profile_ranks="0,3"), rank).begin == begin


@pytest.mark.parametrize(
    ("done", "profile", "rank", "taken"),
    [(0, "10-12", 0, 12), (0, None, 0, 3), (20, None, 0, 23), (20, "10-12", 0, 23), (0, "10-12", 1, 0)],
)
def test_the_memorys_picture_is_taken_after_the_profiled_steps(
    tmp_path: Path, done: int, profile: str | None, rank: int, taken: int, snapshots: list[Path]
) -> None:
    profiler = Profiler(plan(tmp_path, done, profile=profile, memory_snapshot=True), rank)
    due = [step for step in range(done + 1, 30) if profiler.is_due(step)]
    assert due == [taken] * bool(taken)
    for step in range(done + 1, 30):
        profiler.after(step)
    expected = [f"memory_step_{taken}_rank_{rank}.pickle"] * bool(taken)
    assert [path.name for path in (tmp_path / "profile").glob("*")] == expected
    assert len(snapshots) == len(expected)


def test_out_of_memory_leaves_a_picture_if_it_is_wanted(
    tmp_path: Path, snapshots: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.loop.memory.dist.get_rank", lambda: 2)
    monkeypatch.setattr("common.training.loop.memory.memory_remedy", lambda plan: "")
    for wanted in (False, True):
        block = explain_out_of_memory(plan(tmp_path, memory_snapshot=wanted))
        with pytest.raises(KitError, match="rank 2 is out of memory"), block:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        assert (tmp_path / "profile" / "out_of_memory_rank_2.pickle").exists() == wanted


def test_a_picture_that_cannot_be_written_leaves_a_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def dump(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    with caplog.at_level(logging.WARNING, logger="kit"):
        Profiler(plan(tmp_path, memory_snapshot=True), 0).after(3)
    assert len(caplog.records) == 1 and "cannot be written, training goes on" in caplog.text
    assert [*(tmp_path / "profile").iterdir()] == []


def test_torch_has_the_history_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history_impl", lambda *given, **named: asked.append((given, named))
    )
    record_memory()
    (((enabled, *_), named),) = asked
    assert enabled == "all" and named == {"stacks": "python", "max_entries": 100_000}
