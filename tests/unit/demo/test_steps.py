"""A step is run as it is shown, once, and again where its result is missing or incomplete."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest

from common.demo import steps
from common.demo.steps import KIT, Runner, Step, displayed, environment, shown, wrap
from common.errors import KitError
from common.training.loop.metrics import Interval, Meter


class Output(list[str]):
    """The printed lines, as one text."""

    def __str__(self) -> str:
        return "\n".join(self)


def writes(work: Path, name: str, text: str = "whole", **more: object) -> Step:
    """A step that appends `text` to `result` in its folder, and prints a line of the kit's and one of others."""
    folder = work / name
    program = (
        f"mkdir -p {folder} && printf {text} >>{folder}/result && echo '11-30 12:00:00 wrote {name}' && echo noise"
    )
    return Step(
        name=name, title=f"Write {name}", command=("bash", "-c", program), output=folder,
        is_complete=lambda path: (path / "result").is_file(), **more,
    )  # fmt: skip


def test_a_second_run_in_one_folder_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    program = f"""
import pathlib
from common.demo.steps import Runner, Step
work = pathlib.Path({str(tmp_path)!r})
command = ("bash", "-c", "mkdir -p $0/slow; echo begun | tee $0/slow/rows; read < $0/go", str(work))
Runner(work, [Step("slow", "t", command, work / "slow")], print).run()
"""
    os.mkfifo(tmp_path / "go")
    first = subprocess.Popen([sys.executable, "-c", program], cwd=KIT, stdout=subprocess.DEVNULL)
    rows = tmp_path / "slow" / "rows"
    while not rows.is_file():
        assert first.poll() is None
        time.sleep(0.05)
    with pytest.raises(KitError, match=f"another quickstart is running in WORK_DIR={tmp_path}: wait"):
        run(tmp_path, writes(tmp_path, "slow"))
    (tmp_path / "go").write_text("\n")
    assert first.wait() == 0 and rows.read_text() == "begun\n"
    run(tmp_path, writes(tmp_path, "next"))


def test_a_file_system_without_locks_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOSYS, "Function not implemented")):
        run(tmp_path, writes(tmp_path, "first"))
    assert [each.message for each in caplog.records if "the file system does not support locks" in each.message]


def run(work: Path, *steps: Step) -> Output:
    output = Output()
    Runner(work, steps, output.append).run()
    return output


def content(work: Path, name: str) -> str:
    return (work / name / "result").read_text()


def test_steps_run_in_order_and_print_what_they_do(tmp_path: Path) -> None:
    output = run(tmp_path, writes(tmp_path, "one"), writes(tmp_path, "two"))
    text = str(output)
    assert text.index("[1/2] Write one") < text.index("    wrote one") < text.index("[2/2] Write two")
    assert "bash -c" in text and "\n    noise" not in text and text.count("done in 0 s") == 2
    assert (tmp_path / "logs" / "one.log").read_text() == "11-30 12:00:00 wrote one\nnoise\n"
    assert json.loads((tmp_path / "steps" / "one.json").read_text())["seconds"] < 5


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    both = writes(tmp_path, "one"), writes(tmp_path, "two")
    run(tmp_path, *both)
    output = run(tmp_path, *both)
    assert output.count("    done already") == 2 and "    wrote one" not in output
    assert (content(tmp_path, "one"), content(tmp_path, "two")) == ("whole", "whole")


def test_a_lost_result_and_all_later_ones_are_made_again(tmp_path: Path) -> None:
    three = [writes(tmp_path, name, resumes=True) for name in ("one", "two", "three")]
    run(tmp_path, *three)
    (tmp_path / "two" / "result").unlink()
    output = run(tmp_path, *three)
    assert output.count("    done already") == 1
    assert [content(tmp_path, name) for name in ("one", "two", "three")] == ["whole"] * 3


def test_leftovers_of_an_interrupted_run_are_removed_unless_the_step_resumes_from_them(tmp_path: Path) -> None:
    for name in ("anew", "on"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result").write_text("half ")
    run(tmp_path, writes(tmp_path, "on", resumes=True), writes(tmp_path, "anew"))
    assert content(tmp_path, "on") == "half whole"
    assert content(tmp_path, "anew") == "whole"


def test_other_settings_and_other_data_are_refused(tmp_path: Path) -> None:
    data, other = tmp_path / "rows.jsonl", tmp_path / "config.json"
    data.write_text("a")
    other.write_text("{}")
    work = tmp_path / "work"
    run(work, writes(work, "one", settings={"LR": "1"}, reads=(data, other)))
    with pytest.raises(KitError, match=r"with other settings or data \(one: LR=1, LR=2\): use another WORK_DIR"):
        run(work, writes(work, "one", settings={"LR": "2"}, reads=(data, other)))
    data.write_text("ab")
    with pytest.raises(KitError, match=rf"\(one: {data}\): use another"):
        run(work, writes(work, "one", settings={"LR": "1"}, reads=(data, other)))


def test_a_failure_shows_the_end_of_the_log_and_is_done_again(tmp_path: Path) -> None:
    program = f"test -e {tmp_path}/mended || {{ echo 'error: it broke' >&2; exit 7; }}"
    step = Step(
        name="one", title="Break", command=("bash", "-c", program), output=tmp_path / "one", is_complete=lambda _: True
    )
    output = Output()
    with pytest.raises(KitError, match=r"step one ended with exit code 7: .*logs/one.log; the same command resumes"):
        Runner(tmp_path, [step], output.append).run()
    assert "    | error: it broke" in output
    (tmp_path / "mended").touch()
    assert "done in" in str(run(tmp_path, step))


def test_the_shown_command_is_the_one_that_runs(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    program = f'printf "%s" "$A $B" >{tmp_path}/one/result'
    given = {"A": 'it\'s "here"', "B": "/a b"}
    step = Step(
        name="one", title="", command=("bash", "-c", program), output=tmp_path / "one", settings=given, resumes=True
    )
    run(tmp_path, step)
    by_step = content(tmp_path, "one")
    subprocess.run(["bash", "-c", wrap(step.parts, "    ")], check=True, cwd=KIT)
    assert content(tmp_path, "one") == by_step == 'it\'s "here" /a b'


def test_the_users_environment_does_not_reach_a_script_s_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR", "7")
    monkeypatch.setenv("HF_MODEL_PATH", "/elsewhere")
    monkeypatch.setenv("TRAIN_ITERS", "1")
    step = Step("a", "", ("bash", "cpu/3_run_mcore_qwen.sh"), Path("x"), settings={"TRAIN_ITERS": "5"}, uses_port=True)
    given = environment(step)
    assert given["TRAIN_ITERS"] == "5" and "LR" not in given and "HF_MODEL_PATH" not in given
    assert given["PATH"] == os.environ["PATH"] and int(given["MASTER_PORT"]) > 1023
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert environment(step)["MASTER_PORT"] == "1234"


def test_a_long_command_is_cut_between_its_parts() -> None:
    settings = {f"NAME{i}": "a value" for i in range(30)}
    for command in (("bash", "cpu/x.sh"), ("python", "-m", "x", "run", *["--flag", "it's -- a --value"] * 20)):
        step = Step(name="a", title="", command=command, output=Path("a"), settings=settings)
        text = wrap(step.parts, "    ")
        lines = text.split("\n")
        assert len(lines) > 3 and max(map(len, lines)) <= steps.WIDTH
        assert shlex.split(text.replace("\\\n", "")) == [*(f"{name}=a value" for name in settings), *command]
    parts = Step("a", "", ("python", "-m", "x", "--a", "1 2", "--b", "3"), Path("a"), {"A": "1"}).parts
    assert parts == ["A=1", "python -m x", "--a '1 2'", "--b 3"]


def test_paths_are_named_from_the_kits_folder() -> None:
    assert shown(KIT / "work" / "a") == "work/a" and shown(Path("/a/b")) == "/a/b"


def test_lines_of_training_are_cut_short_and_those_of_libraries_left_out() -> None:
    meter = Meter(train_iters=500, global_batch_size=32, seq_length=128, world_size=2, flops_per_token=1e6)
    line = meter.row(100, Interval(loss=1.25, grad_norm=0.5, learning_rate=1e-3, iterations=50, seconds=5.0))
    assert displayed(f"11-30 12:34:56 {line}") == "step 100 of 500 | loss 1.250 | 0:00:40 left"
    assert displayed("11-30 12:34:56 saved work/pretrain") == "saved work/pretrain"
    assert displayed(f"11-30 12:34:56 {meter.header}") is None
    assert displayed("error: no such file") == "error: no such file"
    assert displayed("/x/y.py:114: UserWarning: Apex is not installed") is None
    assert displayed("W1124 20:36:53.730000 4493 torch/distributed/run.py:874] OMP") is None


def test_an_ended_quickstart_ends_its_step(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import signal, sys
        from pathlib import Path
        from common.demo.steps import Runner, Step
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        work = Path({str(tmp_path)!r})
        body = "trap 'touch {tmp_path}/ended; exit' TERM; touch {tmp_path}/begun; while :; do sleep 0.05; done"
        Runner(work, [Step(name="one", title="", command=("bash", "-c", body), output=work / "one")], print).run()
    """)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=KIT, env={**os.environ, "PYTHONPATH": str(KIT)})
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "ended").exists() and not (tmp_path / "steps" / "one.json").exists()
