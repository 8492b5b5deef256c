"""Which checkpoints are kept, what a run records of them, and that a failed removal does not end the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.formats.model_files import KEPT
from common.training.checkpointing.retention import Retention, RetentionRecord, checkpoints_to_remove
from common.training.checkpointing.run_folder import RunFolder
from common.training.settings import TrainSettings

ITERATIONS = [10, 20, 30, 40, 50, 60]


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(save_checkpoint_path="-", dataset_path="-", train_iters=1, **changes)


@pytest.mark.parametrize(
    ("current", "changes", "removed"),
    [
        (60, {"keep_checkpoints": 2}, [10, 20, 30, 40]),
        (60, {"keep_checkpoints": 0}, []),
        (60, {"keep_checkpoints": 9}, []),
        (60, {"keep_checkpoints": 1, "keep_every": 20}, [10, 30, 50]),
        (60, {"keep_checkpoints": 1, "keep_best": 2}, [20, 40, 50]),
        (60, {"keep_checkpoints": 1, "keep_epochs": True}, [10, 30, 40, 50]),
        (60, {"keep_checkpoints": 1, "keep_every": 30, "keep_best": 1, "keep_epochs": True}, [40, 50]),
        # The tracker was set back: what is newer is neither removed nor counted, and the lowest loss of all is there.
        (30, {"keep_checkpoints": 1}, [10, 20]),
        (30, {"keep_checkpoints": 1, "keep_best": 1}, [20]),
        (40, {"keep_checkpoints": 2, "keep_best": 0}, [10, 20]),
        (35, {"keep_checkpoints": 1}, [10, 20]),  # the current one is incomplete: the newest before it stays
    ],
)
def test_what_no_setting_keeps_is_removed(current: int, changes: dict[str, Any], removed: list[int]) -> None:
    record = RetentionRecord({10: 2.0, 20: 4.0, 30: 3.0, 40: 5.0, 50: 6.0, 70: 1.0, 55: 0.5}, {20, 55})
    if current < 60:
        record.validation_losses[60] = 0.1
    assert checkpoints_to_remove(ITERATIONS, current, settings(**changes), record) == removed


def test_a_missing_best_checkpoint_is_not_counted() -> None:
    record = RetentionRecord({5: 0.1, 10: 2.0, 20: 1.0})  # 5 was never saved
    assert checkpoints_to_remove([10, 20, 30], 30, settings(keep_checkpoints=1, keep_best=1), record) == [10]


def test_a_record_is_read_as_it_was_written_and_a_broken_one_is_empty(tmp_path: Path) -> None:
    record = RetentionRecord({20: 1.25, 10: 1 / 3}, {30, 10}, {"law": "ab"}, {5})
    (tmp_path / KEPT).write_text(json.dumps(record.to_json()))
    assert RetentionRecord.read(tmp_path) == record
    for broken in ("", "[]", "3", '{"validation_losses": [], "epoch_ends": []}', '{"epoch_ends": []}',
                   '{"validation_losses": {"x": 1}, "epoch_ends": []}', '{"validation_losses": {}, "epoch_ends": 3}',
                   json.dumps(record.to_json())[:30]):  # fmt: skip
        (tmp_path / KEPT).write_text(broken)
        assert RetentionRecord.read(tmp_path) == RetentionRecord(), broken
    (tmp_path / KEPT).write_bytes(b"\xff\xfe")
    assert RetentionRecord.read(tmp_path) == RetentionRecord()
    assert RetentionRecord.read(tmp_path / "nowhere") == RetentionRecord()


class Folder:
    """A run's folder, used only for RunFolder's removals."""

    remove, remove_replaced, _removing = RunFolder.remove, RunFolder.remove_replaced, RunFolder._removing

    def __init__(self, path: Path) -> None:
        self.path = path


def checkpoints(folder: Path, *iterations: int) -> list[Path]:
    paths = [folder / f"iter_{iteration:07d}" for iteration in iterations]
    for path in paths:
        path.mkdir()
        (path / ".metadata").touch()
        (path / "metadata.json").touch()
    return paths


def test_a_failed_removal_is_logged_and_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths, remove = checkpoints(tmp_path, 10, 20, 30), shutil.rmtree

    def refuse(path: Path) -> None:
        (path / ".metadata").unlink()
        raise OSError(116, "Stale file handle", str(path))

    kept = Retention(settings(keep_checkpoints=1), Folder(tmp_path))  # type: ignore[arg-type]
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level("INFO", "kit"):
        kept.prune(30)
        kept.wait()
    (message,) = caplog.messages
    assert message.startswith("could not remove an older checkpoint ([Errno 116] Stale file handle: ")
    assert not paths[0].exists()  # half removed, it bears no checkpoint's name
    assert len(list(tmp_path.glob("iter_0000010.removing_*"))) == 1 and paths[1].exists()
    monkeypatch.setattr(shutil, "rmtree", remove)
    with caplog.at_level("INFO", "kit"):
        kept.prune(30)
        kept.wait()
    assert caplog.messages[1:] == ["removed 1 older checkpoint(s): KEEP_CHECKPOINTS=1"]
    assert sorted(tmp_path.iterdir()) == paths[2:]
