"""Step 1 as users run it, for its tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import TEXTS

ROOT = Path(__file__).parents[2]


def start(command: str, **flags: Any) -> subprocess.Popen[str]:
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    check = ["--check"] if flags.get("check") else []
    words = [word for word in words if word not in ("--check", "True")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "common.preprocess", command, *words, *check],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(command: str, expect: int = 0, **flags: Any) -> tuple[str, str]:
    """(stdout, stderr) of the command, which must exit with `expect`."""
    process = start(command, **flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == expect, err
    return out, err


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(count: int) -> list[str]:
    return [f"{i} {TEXTS[i % 4]} <|im_end|>" * (i % 4) for i in range(count)]


def chats(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": "Be brief." * (i % 2), "input": f"What is {i}+1?", "output": f"It is {i + 1}。"}
        for i in range(count)
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Returns when `reached`, or the process has ended."""
    deadline = time.monotonic() + 60
    while not reached() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
