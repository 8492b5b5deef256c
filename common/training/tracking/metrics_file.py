"""metrics.jsonl: a JSON object per line for each log line and each evaluation of a run.

Keys: `iteration`, `time` (seconds since 1970), `start` (the number of the run's start, from 0, as in run.json) and the
metrics; a value that is not finite is null. A run that resumes from an earlier iteration appends the repeated ones
again: `records.read_metrics` returns what holds.
"""

import json
import math
import time
from pathlib import Path

from common.training.tracking.records import METRICS_FILE
from common.training.tracking.run_file import RunFile


class MetricsFile:
    """Appends metrics to SAVE_CHECKPOINT_PATH/metrics.jsonl."""

    def __init__(self, folder: Path, start: int) -> None:
        self._file, self._start = RunFile(folder / METRICS_FILE), start

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Appends one line."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"iteration": iteration, "time": round(time.time(), 3), "start": self._start, **values}
        self._file.append(json.dumps(line) + "\n")
