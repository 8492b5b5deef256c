"""metrics.jsonl: a JSON object per line for each log line and each evaluation of a run.

Keys: `iteration`, `time` (seconds since 1970), `start` (the number of the run's start, from 0, as in run.json) and the
metrics; a value that is not finite is null. A run that resumes from an earlier iteration appends the repeated ones
again: `read_metrics` returns what holds.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from common.training.tracking.run_file import RunFile

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends metrics to SAVE_CHECKPOINT_PATH/metrics.jsonl."""

    def __init__(self, folder: Path, start: int) -> None:
        self._file, self._start = RunFile(folder / METRICS_FILE), start

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Appends one line."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"iteration": iteration, "time": round(time.time(), 3), "start": self._start, **values}
        self._file.append(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder`/metrics.jsonl that hold, in the order of their iterations.

    Left out: lines that a kill cut short, and those of a start that a later start has repeated, which are all from the
    first iteration of the later one on. Raises OSError if there is no such file.
    """
    lines: list[dict[str, Any]] = []
    for text in (folder / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            iteration, start = line["iteration"], line["start"]
        except (ValueError, TypeError, KeyError):
            continue
        if lines and start > lines[-1]["start"]:
            lines = [each for each in lines if each["iteration"] < iteration]
        lines.append(line)
    return lines
