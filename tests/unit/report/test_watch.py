"""The live view of a run: progress, time left, curve, and how it ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.report.runs import end_reason, read_run
from common.training.tracking.metrics_file import MetricsFile
from common.watch import BLOCKS, sparkline, time_left
from tests.unit.report.test_report import write_run

WATCH = [sys.executable, "-m", "common.watch"]


def test_it_shows_progress_losses_and_speed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = subprocess.run([*WATCH, run, "--once"], capture_output=True, text=True, check=True, env={"COLUMNS": "100"})
    for text in (
        "iteration 4,000 of 4,000", "validation loss 2.1000, best 2.0000 at iteration 3,000", "28,600 tokens/s",
        "560. TFLOP/s/GPU", "101.2 GiB at most", " complete ", "█",
    ):  # fmt: skip
        assert text in done.stdout, done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_it_follows_a_run_until_that_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    record = (run / "run.json").read_text()
    (run / "run.json").write_text(record.replace('"end"', '"end_of_another"'))
    assert end_reason(read_run(run)) is None
    watch = subprocess.Popen([*WATCH, run, "--interval", "0.1"], stdout=subprocess.PIPE, text=True)
    time.sleep(1.5)
    assert watch.poll() is None
    MetricsFile(run, 0).log(40, {"loss": 1.5})
    (run / "new.json").write_text(record)
    (run / "new.json").replace(run / "run.json")  # at once, as a run does
    output, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0 and "iteration 40 of 4,000" in output and " complete " in output


def test_the_time_left_includes_evaluation_and_saving() -> None:
    lines = [{"iteration": 10 * number, "time": 25.0 * number} for number in range(1, 101)]
    assert time_left(lines, 5000) == "2:46:40"  # 4,000 iterations of 2.5 s
    assert time_left(lines[:1], 5000) == "?"


@pytest.mark.parametrize(("values", "line"), [([0, 7], "▁█"), ([5, 5, 5], "▁▁▁"), ([0, 1, 2, 3, 4, 5, 6, 7], BLOCKS)])
def test_a_sparkline_spans_the_blocks(values: list[float], line: str) -> None:
    assert sparkline(list(enumerate(values)), 8) == line
    assert len(sparkline(list(enumerate(values * 100)), 8)) == 8
