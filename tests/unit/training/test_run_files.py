"""What a run records in its folder, on disks that fail and after kills."""

import logging
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import KitError
from common.training.tracking.log_file import log_file
from common.training.tracking.metrics_file import MetricsFile
from common.training.tracking.records import METRICS_FILE, RUN_RECORD, read_metrics, read_run_record
from common.training.tracking.run_file import RunFile
from common.training.tracking.tensorboard import TensorBoardTracker

logger = logging.getLogger("kit")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "kit", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here: no right to")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def test_a_full_disk_costs_lines_and_one_warning(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, filler = RunFile(small_disk / "log.txt"), small_disk / "filler"
    file.append("first\n")
    filler.write_bytes(bytes(12 << 10))
    for number in range(3):
        file.append("x" * 5000 + f" {number}\n")
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "log.txt cannot be written, training goes on: " in warnings[0]
    assert "No space left on device" in warnings[0]
    filler.unlink()
    file.append("last\n")
    lines = (small_disk / "log.txt").read_text().splitlines()
    assert lines[0] == "first" and lines[-1] == "last"  # a part of another line is not glued to it


def test_a_full_disk_leaves_one_whole_event_file_and_one_warning(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, filler = TensorBoardTracker(small_disk, 1), small_disk / "filler"
    tracker.log(1, {"loss": 1.0})
    filler.write_bytes(bytes(12 << 10))
    for iteration in range(2, 200):
        tracker.log(iteration, {"loss": 1.0 / iteration, "grad_norm": 1.0})
    filler.unlink()
    tracker.log(200, {"loss": 0.5})
    assert len([*(small_disk / "tensorboard").iterdir()]) == 1
    assert len([record for record in caplog.records if "cannot be written" in record.getMessage()]) == 1
    accumulator = EventAccumulator(str(small_disk / "tensorboard"))
    accumulator.Reload()
    steps = [event.step for event in accumulator.Scalars("loss")]
    assert steps[0] == 1 and steps[-1] == 200 and 2 < len(steps) < 200


def test_nothing_is_written_to_another_disk_in_the_folders_place(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = RunFile(small_disk / "log.txt")
    file.append("here\n")
    subprocess.run(["mount", "-t", "tmpfs", "other", str(small_disk)], check=True)
    file.append("there\n")
    assert not list(small_disk.iterdir()) and "cannot be written" in caplog.text
    subprocess.run(["umount", str(small_disk)], check=True)
    file.append("here again\n")
    assert (small_disk / "log.txt").read_text() == "here\n\nhere again\n"


def test_a_folder_that_is_removed_and_made_again_is_written_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with log_file(folder, lambda: logger.warning("the plan")):
        logger.warning("one")
        (folder / "log.txt").unlink()
        folder.rmdir()
        logger.warning("two")  # its own failure is logged to the terminal, and nothing loops
        folder.mkdir()
        logger.warning("three")
    logger.warning("four")
    assert [line[20:] for line in (folder / "log.txt").read_text().splitlines() if line] == ["three"]
    assert "No such file or directory" in caplog.text


def test_metrics_of_a_start_that_was_repeated_are_replaced(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, 0)
    for iteration in range(1, 6):
        first.log(iteration, {"loss": float(iteration)})
    first.log(5, {"validation_loss": 1.0})
    with (tmp_path / METRICS_FILE).open("a") as stream:
        stream.write('{"iteration": 6, "lo')  # killed
    second = MetricsFile(tmp_path, 1)
    second.log(4, {"loss": 40.0})
    second.log(5, {"loss": float("nan")})
    found = [(line["iteration"], line.get("loss", "none")) for line in read_metrics(tmp_path)]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, None)]


@pytest.mark.parametrize("content", ["[1]", "{}", '{"starts": 1}', "{"])
def test_another_file_in_the_run_records_place_is_refused(tmp_path: Path, content: str) -> None:
    assert read_run_record(tmp_path) == {"starts": []}
    (tmp_path / RUN_RECORD).write_text(content)
    with pytest.raises(KitError, match=r"run\.json is not .*: move it away"):
        read_run_record(tmp_path)
