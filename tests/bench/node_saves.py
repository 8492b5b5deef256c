"""Saves, resumes and kills of a row of tests.bench.bench_node, on the GPUs that it trains on."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import STOPPED
from common.tune.trial import end, steps_of
from tests.bench.bench_save import SAVED, dd

READ = re.compile(r"read ([\d.]+) MB of \S+ in ([\d.]+) s on rank 0")
SAVES, SAVE_EVERY = 2, 3
KILLS, KILLS_SAVE_EVERY = 10, 4  # SIGKILL and SIGTERM in turn
# Starts the row's command with more flags, and its output into a log.
Launch = Callable[[list[str], Path], "subprocess.Popen[bytes]"]


@contextmanager
def running(launch: Launch, flags: dict[str, Any], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A run in the block; nothing of it is left after it."""
    process = launch([f"--{name}={value}" for name, value in flags.items()], log)
    try:
        yield process
    finally:
        end(process)


def wait_until(process: "subprocess.Popen[bytes]", reached: Callable[[], bool], log: Path, limit_s: float) -> None:
    """Raises RuntimeError with the end of the log if the run ends before, or time is over."""
    deadline = time.monotonic() + limit_s
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text(errors="replace")[-3000:])
        time.sleep(0.2)


def measure_saves(launch: Launch, folder: Path, ranks: int, *, asynchronous: bool, limit_s: float) -> dict[str, Any]:
    """Two saves, beside `dd` of as many processes as ranks; and the run resumed from the last one by a new command.

    Sizes in GB, times in seconds: `paused_s` is how long training stood still, `first_step_s` from the command to the
    end of the first step after the resume, `read` rank 0's own share. Raises RuntimeError if a run fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    disk, log = dd(folder, ranks), folder.with_suffix(".log")

    def saves() -> list[dict[str, float]]:
        found = [SAVED.search(line) for line in log.read_text(errors="replace").splitlines()]
        return [
            {"gb": float(each[2]) / 1e3, "s": float(each[3]), "paused_s": float(each[4] or each[3])}
            for each in found
            if each
        ]

    once = {"save-interval": SAVE_EVERY, "keep-checkpoints": 1, "async-save": str(asynchronous).lower()}
    with running(launch, once, log) as process:
        wait_until(process, lambda: len(saves()) >= SAVES, log, limit_s)
    result: dict[str, Any] = {"dd_gb_s": round(disk, 2), "saves": saves()}
    result["step_ms"] = round(steps_of(folder)[-1]["ms_per_iteration"])
    began, before = time.monotonic(), last_start(folder)
    with running(launch, {}, log) as process:
        wait_until(process, lambda: last_start(folder) > before, log, limit_s)
        result["first_step_s"] = round(time.monotonic() - began, 1)
    if read := READ.search(log.read_text(errors="replace")):
        result["read"] = {"gb": float(read[1]) / 1e3, "s": float(read[2])}
    return result


def measure_kills(launch: Launch, folder: Path, *, until: float, limit_s: float) -> dict[str, Any] | None:
    """Five SIGKILLs and five SIGTERMs at random moments, and what the same command makes of them; None: time is over.

    `lost` steps are those between a signal and the checkpoint before, which are repeated; `apart` is the largest
    relative difference of a loss that was logged twice. Nothing may be missing between the first step and the last.
    A later call goes on in the same folder. Raises RuntimeError if a run fails or a step is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, log, rng = folder / "kills.json", folder.with_suffix(".log"), random.Random(1)
    done = json.loads(state.read_text()) if state.exists() else []
    while len(done) < KILLS:
        if time.monotonic() + max([60.0, *(kill["seconds"] for kill in done)]) > until:
            return None
        began, seen, start = time.monotonic(), len(lines_of(folder)), last_start(folder)
        signal_sent = signal.SIGTERM if len(done) % 2 else signal.SIGKILL
        wanted = rng.randrange(2, 2 * KILLS_SAVE_EVERY)
        with running(launch, {"save-interval": KILLS_SAVE_EVERY, "keep-checkpoints": 1}, log) as process:
            wait_until(process, lambda: len(lines_of(folder)) >= seen + wanted, log, limit_s)  # noqa: B023
            time.sleep(rng.uniform(0, 2))
            os.kill(process.pid, signal_sent)
            code = process.wait(limit_s)
        lines = lines_of(folder)
        if signal_sent == signal.SIGTERM and code != STOPPED or last_start(folder) <= start:
            raise RuntimeError(f"exit code {code}: {log.read_text(errors='replace')[-3000:]}")
        tracker = folder / "latest_checkpointed_iteration.txt"
        saved = int(tracker.read_text()) if tracker.exists() else 0
        assert not saved or (folder / f"iter_{saved:07d}" / "metadata.json").is_file()
        done.append({
            "signal": signal_sent.name, "lost": lines[-1]["iteration"] - saved,
            "seconds": round(time.monotonic() - began, 1),
        })  # fmt: skip
        state.write_text(json.dumps(done))
    return {"kills": done, **compared(lines_of(folder))}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl with a loss, those of repeated steps too."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, filter(lambda text: text.endswith("}"), lines)) if "loss" in line]


def last_start(folder: Path) -> int:
    """The number of the last start that has logged a step; -1: none."""
    return max((line["start"] for line in lines_of(folder)), default=-1)


def compared(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How many steps were logged twice, and how far apart their losses are; RuntimeError if a step is missing."""
    by_step: dict[int, list[float]] = {}
    for line in lines:
        by_step.setdefault(line["iteration"], []).append(line["loss"])
    if missing := set(range(1, max(by_step) + 1)) - set(by_step):
        raise RuntimeError(f"steps {sorted(missing)} are missing")
    pairs = [pair for losses in by_step.values() for pair in itertools.pairwise(losses)]
    apart = max((abs(one - other) / other for one, other in pairs), default=0.0)
    return {"steps": max(by_step), "repeated": len(pairs), "apart": apart}
