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
