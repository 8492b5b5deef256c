"""The report of runs: what it sums up, and a page that needs nothing else."""

import math
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common.errors import KitError
from common.files import write_json
from common.report.page import page
from common.report.runs import (
    MAX_POINTS,
    different_settings,
    latest,
    read_reference,
    read_run,
    read_samples,
    smooth,
    smoothing,
    summary,
    thin,
)
from common.training.tracking.metrics_file import MetricsFile
from common.training.tracking.records import RUN_RECORD

START = {
    "time": "2026-11-29T19:00:00+0000", "iteration": 0, "train_iters": 4000, "world_size": 8,
    "start": {"kind": "weights", "from": "/ckpt/start/release"}, "parallel": {"tp": 2, "pp": 1, "dp": 4},
    "device": {"name": "NVIDIA H200"}, "command": "python -m common.train", "kit": "0123abc",
    "data": {"seq_length": 4096}, "versions": {"torch": "2.11.0"},
    "datasets": [
        {"use": "training", "path": "/data/pt", "documents": 42864, "dropped": 0, "tokens": 57153010, "longest": 93092}
    ],
    "settings": {"lr": 1e-5, "precision": "bf16", "seed": 1},
}  # fmt: skip


def write_run(folder: Path, number: int = 400, **settings: Any) -> Path:
    """Records as training writes them: `number` log lines ten iterations apart, a validation every hundred."""
    folder.mkdir()
    metrics, rng = MetricsFile(folder, 0), random.Random(1)
    for iteration in range(10, 10 * number + 1, 10):
        values = {"loss": 2 + math.exp(-iteration / 500) + rng.gauss(0, 0.1), "grad_norm": 1.0, "learning_rate": 1e-5}
        speed = {"tokens_per_s": 28_600.0, "tflops_per_gpu": 560.0, "memory_gib": 101.25, "saving_s": 0.5}
        metrics.log(iteration, {**values, **speed, "skipped_steps": 2.0})
        if not iteration % 100:
            metrics.log(iteration, {"validation_loss": 2 + abs(iteration - 3000) / 1e4})
    end = {"time": "2026-11-29T20:00:00+0000", "iteration": 10 * number, "reason": "complete"}
    write_json(folder / RUN_RECORD, {"starts": [{**START, "settings": {**START["settings"], **settings}, "end": end}]})
    return folder


class Elements(HTMLParser):
    """The names of a page's elements, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


def test_a_run_is_summed_up(tmp_path: Path) -> None:
    found = summary(read_run(write_run(tmp_path / "run")))
    assert found["iteration"] == "4,000 of 4,000" and found["state"] == "complete"
    assert found["best validation loss"] == "2.0000 at iteration 3,000"
    assert found["tokens/s"] == "28,600" and found["peak memory"] == "101.2 GiB"
    assert found["evaluation, saving"] == "0 s, 200 s" and found["skipped steps"] == "2"
    assert 1.9 < float(found["loss"]) < 2.1


def test_the_average_does_not_lag_behind_a_falling_curve() -> None:
    line = [(i, 10 - 0.5 * i) for i in range(20)]
    assert [value for _, value in smooth(line, 4)] == pytest.approx([value for _, value in line])
    assert smooth([(1, 1.0), (2, 4.0), (3, 1.0)], 1) == [(1, 1), (2, pytest.approx(2)), (3, 1)]
    assert latest([(i, float(i % 2)) for i in range(200)]) == pytest.approx(5 / 9)  # the last nine


@pytest.mark.parametrize(("number", "width"), [(1, 0), (39, 0), (40, 0), (60, 1), (200, 4), (10**6, 100)])
def test_short_curves_are_shown_as_they_are(number: int, width: int) -> None:
    assert smoothing(number) == width


def test_long_curves_are_averaged_in_groups() -> None:
    points = [(number, float(number % 2)) for number in range(10 * MAX_POINTS)]
    assert thin(points) == [(10 * number + 9, 0.5) for number in range(MAX_POINTS)]
    assert thin(points[:7]) == points[:7]


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    runs = [tmp_path / "<script>alert(1)<&script>", tmp_path / "b"]
    for number, folder in enumerate(runs):
        write_run(folder, lr=(number + 1) * 1e-5)
    output, png = tmp_path / "report.html", tmp_path / "curves.png"
    command = [sys.executable, "-m", "common.report", *runs, "--output", output, "--png", png]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"ok: {output}\n" and png.read_bytes().startswith(b"\x89PNG")
    elements = Elements(output.read_text(encoding="utf-8"))
    assert elements.names.count("svg") == 5 and not {"script", "link", "img", "iframe"} & {*elements.names}
    assert all(value.startswith("#") for value in elements.loads)


def test_answers_data_and_a_reference_are_shown(tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "report.html"
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"input": "1 < 2?", "output": "Yes:\\n<b>1</b>", "tokens": 3}\n')
    words = ["--output", output, "--samples", answers, "--reference", "trigrams=3.396"]
    command = [sys.executable, "-m", "common.report", run, *words]
    subprocess.run(command, capture_output=True, check=True)
    text = output.read_text(encoding="utf-8")
    assert "<pre>Yes:\n&lt;b&gt;1&lt;/b&gt;</pre>" in text and "<pre>1 &lt; 2?</pre>" in text
    assert "<td>42,864</td><td>0</td><td>57,153,010</td>" in text
    assert text.count("trigrams: 3.4") == 1  # matplotlib writes each text of an SVG as a comment, too


@pytest.mark.parametrize("text", ["3.4", "=3.4", "trigrams=", "trigrams=nan"])
def test_a_reference_without_name_or_loss_is_refused(text: str) -> None:
    with pytest.raises(KitError, match="give a name and a loss, as trigrams=3.4"):
        read_reference(text)


@pytest.mark.parametrize("line", ["no json", "[1]", '{"text": "a"}', '{"output": 1}'])
def test_samples_without_an_output_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"output": "a"}\n' + line)
    with pytest.raises(KitError, match='rows.jsonl, line 2: not a row with an "output"'):
        read_samples(tmp_path / "rows.jsonl")


def test_runs_are_compared_by_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, 2, lr=lr)) for name, lr in (("a", 1e-5), ("b", 2e-5))]
    assert different_settings(runs) == {"lr": ["1e-05", "2e-05"]}
    assert "<td>2e-05</td>" in page(runs, [], [])


def test_a_run_that_was_killed_before_its_record_is_still_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    (run / RUN_RECORD).unlink()
    text = page([read_run(run)], [], [])
    assert "running, or killed" in text and "30 of 0" not in text


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot be read"), ("", "holds no metrics yet")])
def test_a_folder_without_metrics_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(KitError, match=reason):
        read_run(tmp_path)
