"""The report at the end."""

from pathlib import Path

import pytest

from common.demo.__main__ import judge
from common.demo.answers import Answer
from common.demo.report import losses, one_line, report, score
from common.demo.steps import Runner, Step
from common.training.loop.metrics import Interval, Meter


def training_log(path: Path, *losses_at: tuple[int, float]) -> Path:
    """A log of training as the loop writes it, with other lines between."""
    meter = Meter(train_iters=30, global_batch_size=8, seq_length=64, world_size=2, flops_per_token=1e6)
    lines = ["W1 torchrun says something | loss 9 | left"]
    for at, loss in losses_at:
        interval = Interval(loss=loss, grad_norm=0.5, learning_rate=1e-3, iterations=10, seconds=1.0)
        lines += [f"11-30 12:00:00 {meter.row(at, interval)}", "11-30 12:00:01 validation at iteration 20  loss 1.0"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_losses_are_the_first_and_the_last_of_training(tmp_path: Path) -> None:
    log = training_log(tmp_path / "a.log", (1, 6.25), (10, 3.5), (30, 0.125))
    assert losses(log) == (6.25, 0.125)
    assert losses(training_log(tmp_path / "b.log")) is None and losses(tmp_path / "none.log") is None


def test_only_exact_answers_count() -> None:
    answers = [Answer("q", "42", "", "42"), Answer("q", "42", "42", "42 "), Answer("q", "a", "b", "A")]
    assert (score(answers, "before"), score(answers, "after")) == (1, 1)


def test_a_text_fits_a_line() -> None:
    assert one_line("a\nb") == "a ⏎ b"
    assert one_line("x" * 200) == "x" * 70 + " …"


def test_the_report_shows_losses_answers_and_paths(tmp_path: Path) -> None:
    names = ("tokens_finetune", "finetune", "answers")
    steps = [Step(name=name, title="", command=("true",), output=tmp_path / name) for name in names]
    training_log(tmp_path / "logs" / "finetune.log", (1, 6.25), (30, 0.125))
    answers = [Answer(f"question\n{i}", f"right {i}", f"before {i}", f"after {i}") for i in range(9)]
    lines = list(report(Runner(tmp_path, steps, print), answers, ("raw", "trained")))
    text = "\n".join(lines)
    assert "    finetune     6.250  ->    0.125" in lines
    assert "    question ⏎ 0" in lines and "        trained    after 0" in lines and "after 6" not in text
    assert "        raw        before 0" in lines and "        expected   right 0" in lines
    assert all(any(str(step.output) in line for line in lines) for step in steps)


def test_a_score_under_nine_tenths_ends_in_failure(capsys: pytest.CaptureFixture[str]) -> None:
    judge(0, 45, 50)
    assert "45 of 50 questions right, all held out from training; untrained: 0." in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        judge(0, 44, 50)
    assert ended.value.code == 1
    assert "too few: at least 45 are expected" in capsys.readouterr().out
