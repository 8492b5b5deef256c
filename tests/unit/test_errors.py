"""What a command says and how it exits when something is wrong."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common import errors
from common.errors import KitError

ROOT = Path(__file__).parents[2]


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_a_mistake_of_the_user_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        errors.run(raising(KitError("TP=3: it must divide 8: use 2")))
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: TP=3: it must divide 8: use 2\n")


def test_ctrl_c_is_a_word_and_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        errors.run(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("error", [ValueError("ours"), SystemExit(7)], ids=repr)
def test_what_is_no_mistake_of_the_user_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        errors.run(raising(error))
    assert raised.value is error


def test_success_exits_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    errors.run(lambda: None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("raised", "code", "last"),
    [
        ("KitError('TP=3')", 2, "error: TP=3"),
        ("KeyboardInterrupt()", 130, "interrupted"),
        ("ValueError('ours')", 1, "ValueError: ours"),
        ("SystemExit(7)", 7, ""),
        ("SystemExit()", 0, ""),
    ],
)
def test_a_ranks_error_ends_it_before_anything_is_taken_down(raised: str, code: int, last: str) -> None:
    program = f"""
import atexit
from common.errors import KitError, exit_at_once
atexit.register(print, "taken down")
with exit_at_once():
    print("begun")
with exit_at_once():
    raise {raised}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.strip().split("\n")[-1]) == (code, "begun\n", last)


def test_a_command_refuses_without_a_traceback() -> None:
    words = [
        "common.preprocess",
        "pretrain",
        "--input=/nowhere",
        "--output-prefix=/nowhere/a",
        "--tokenizer-path=/nowhere",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr and "/nowhere" in done.stderr
