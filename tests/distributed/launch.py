"""Starts what these tests run: real processes, the kit's own commands."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.convert import ToHuggingFace, ToMegatron, to_hf, to_megatron

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"iteration (\d+)/\d+ .*? loss ([\d.]+) .*? grad norm ([\d.]+)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def environment(platform: str = "cpu") -> dict[str, str]:
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "KIT_PLATFORM": platform,
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


def convert(load: Path, save: Path, **settings: Any) -> Path:
    """`save`, after step 2's Hugging Face to Megatron; in this process, which saves its start."""
    to_megatron(ToMegatron(str(load), str(save), **settings), check=False)
    return save


def export(load: Path, save: Path, **settings: Any) -> Path:
    """`save`, after step 2's Megatron to Hugging Face."""
    to_hf(ToHuggingFace(str(load), str(save), **settings), check=False)
    return save


def steps(log: str) -> list[tuple[int, float, float]]:
    """(iteration, loss, gradient norm) of each log line."""
    return [(int(i), float(loss), float(norm)) for i, loss, norm in STEP.findall(log)]


def worker(processes: int, task: dict[str, Any]) -> None:
    """Runs tests/distributed/worker.py under torchrun."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port()))
    run(*torchrun, "-m", "tests.distributed.worker", json.dumps(task))
