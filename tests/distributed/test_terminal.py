"""What a run shows in a terminal: whole lines of 100 columns above one bar, in colors unless NO_COLOR is set."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_validation_sets import settings
from tests.distributed.user import ROOT, environment, step3

TIME = r"\d\d-\d\d \d\d:\d\d:\d\d"
CONTROL = re.compile(r"\x1b\[([\d;]*)([A-Za-z])")


def in_terminal(given: dict[str, Any]) -> tuple[int, str]:
    """(exit code, all that it wrote) of step 3 in a terminal of 120 columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
    command = ["bash", str(ROOT / "cpu" / "3_run_mcore_qwen.sh")]
    process = subprocess.Popen(
        command, env=environment({"TERM": "xterm", **given}), stdin=child, stdout=child, stderr=child,
        start_new_session=True,
    )  # fmt: skip
    os.close(child)
    found = b""
    while True:
        try:
            part = os.read(parent, 1 << 16)
        except OSError:  # the last process has closed it
            break
        if not part:
            break
        found += part
    os.close(parent)
    return process.wait(60), found.decode(errors="replace")


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end, with those that were scrolled out of it."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(text):
        if control := CONTROL.match(text, at):
            if control[2] == "K":
                lines[row] = lines[row][:column]
            elif control[2] == "A":
                row -= int(control[1] or 1)
            else:
                assert control[2] == "m", control
            at = control.end()
            continue
        character = text[at]
        at += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("more", [{}, {"NO_COLOR": "1"}], ids=["colored", "plain"])
def test_lines_are_whole_above_the_bar(work: Path, more: dict[str, str]) -> None:
    name = "plain" if more else "colored"
    steps = {"TRAIN_ITERS": 30, "EVAL_INTERVAL": 10, "SAVE_INTERVAL": 10, "GPUS": 2, "MAX_BAD_STEPS": 0}
    # Steps above SKIP_GRAD_NORM log a line of their own between those of the table.
    given = settings(work, name, f"a {work}/sft b {work}/sft", **steps, SKIP_GRAD_NORM=6.1)
    code, text = in_terminal({**given, **more})
    assert code == 0, text[-3000:]
    shown = [line for line in screen(text) if line]
    # The bar was there, and is gone. Its last step is drawn only where a tenth of a second has passed since.
    assert re.search(r"\d/30 \[", text) and not [line for line in shown if "%|" in line]
    for words in (
        "iteration 30/30",
        "validation at iteration 10 ",
        "  b ",
        "saved ",
        r"iteration \d+ skipped",
        "stopped",
    ):
        assert [line for line in shown if re.match(f"{TIME} {words}", line)], f"{words}\n" + "\n".join(shown)
    table = [line for line in shown if re.match(f"{TIME} iteration \\d+/", line)]
    assert len(table) == 30 and len({*map(len, table)}) == 1
    heads = [line for line in shown if line.endswith("left")]
    assert len(heads) == 2 and {len(line) for line in heads} == {len(table[0])}
    assert CONTROL.sub("", text).count(" left") == len(heads)  # the bar has none of its own
    long = [line for line in shown if len(line) > 100 and re.match(TIME, line) and str(work) not in line]
    assert not long, "\n".join(long)
    colors = re.findall(r"\x1b\[\d*m", text)
    assert not colors if more else {"\x1b[1m", "\x1b[2m", "\x1b[32m"} <= {*colors}
    assert "\x1b" not in (work / name / "log.txt").read_text(encoding="utf-8")


def test_an_error_is_a_line_of_its_own(work: Path) -> None:
    code, text = in_terminal(settings(work, "too_high", f"{work}/sft", GPUS=2, TRAIN_ITERS=30, MAX_FIRST_LOSS=0.5))
    shown = screen(text)
    assert code == 2 and [line for line in shown if line.startswith("error: ") and "MAX_FIRST_LOSS=0.5" in line], text
    assert not [line for line in shown if "error: " in line and not line.startswith("error: ")]


def test_a_file_gets_no_control_sequences_and_no_bar(work: Path) -> None:
    log = step3(settings(work, "in_file", f"{work}/sft", GPUS=2, TRAIN_ITERS=3), work / "in_file.log", TERM="xterm")
    assert "\x1b" not in log and "\r" not in log and "%|" not in log
    assert re.search(f"^{TIME} iteration 3/3 ", log, re.MULTILINE)
