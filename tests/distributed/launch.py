"""Starts what these tests run: real processes, the kit's own commands."""

import atexit
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from common.ports import free_port

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"iteration (\d+)/\d+ +([\d.]+) +([\d.]+) ")  # loss, grad norm


def environment(platform: str = "cpu") -> dict[str, str]:
    path = ":".join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "KIT_PLATFORM": platform,
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def words(flags: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]


def run(*command: str, expect: int = 0, timeout: int = 300, more: dict[str, str] | None = None) -> str:
    """stdout and stderr of a command, which must exit with `expect`; `more` goes into its environment."""
    done = subprocess.run(
        [sys.executable, *command], env=environment() | (more or {}), text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


def train(expect: int = 0, more: dict[str, str] | None = None, **flags: Any) -> str:
    """The log of `python -m common.train` with these settings, and with `more` in its environment."""
    return run("-m", "common.train", *words({"master_port": free_port(), **flags}), expect=expect, more=more)


def train_forked(expect: int = 0, more: dict[str, str] | None = None, **flags: Any) -> str:
    """`train`'s log without torchrun: of its check, which must exit with `expect`, and after 0 of forked ranks."""
    given = words(flags)
    log = forked(0, "common.train", [*given, "--check"], expect, more)
    return log if expect else log + forked(flags.get("gpus", 1), "common.train", given, more=more)


@cache
def parent(python_path: str) -> "subprocess.Popen[str]":
    """The process that forks what is run with this PYTHONPATH (ranks.py), until this one ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.ranks"], env=environment() | {"PYTHONPATH": python_path}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.communicate)  # ends its stdin, and waits for it
    return process


def forked(ranks: int, module: str, given: list[str], expect: int = 0, more: dict[str, str] | None = None) -> str:
    """stdout and stderr of `ranks` ranks of `python -m module`, or, with 0, of one process that is no rank."""
    variables = environment() | (more or {})
    process = parent(variables["PYTHONPATH"])
    assert process.stdin and process.stdout
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        job = {"module": module, "words": given, "environment": variables, "log": log.name, "seconds": 300}
        process.stdin.write(json.dumps({**job, "ranks": ranks, "port": free_port()}) + "\n")
        process.stdin.flush()
        found, text = int(process.stdout.readline()), log.read()
    assert found == expect, f"exit code {found}:\n{text[-6000:]}"
    return text


def steps(log: str) -> list[tuple[int, float, float]]:
    """(iteration, loss, gradient norm) of each log line."""
    return [(int(i), float(loss), float(norm)) for i, loss, norm in STEP.findall(log)]


def worker(processes: int, task: dict[str, Any], name: str = "worker") -> None:
    """Runs tests/distributed/worker.py, or another program beside it, in `processes` forked ranks."""
    forked(processes, f"tests.distributed.{name}", [json.dumps(task)])
