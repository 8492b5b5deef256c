"""A run's records, summed up for its report."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from common.errors import KitError, reading
from common.training.tracking.records import METRICS_FILE, VALIDATION_LOSS, read_metrics, read_run_record

Points = list[tuple[int, float]]
WINDOW = 1 / 20  # of a curve's points that a point of its moving average is the mean of, at most 200
UNKNOWN_END, KILLED = "running, or killed", "killed"  # of the last start, which has no end yet; of an earlier one
MAX_POINTS = 1000  # of a curve; more are averaged in groups


@dataclass(frozen=True)
class Run:
    """A folder's metrics, in the order of their iterations, and the descriptions of its starts."""

    name: str
    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]]

    def curve(self, metric: str) -> Points:
        """(iteration, value) of each line that has a finite `metric`."""
        return [(line["iteration"], line[metric]) for line in self.lines if isinstance(line.get(metric), int | float)]

    @property
    def validation_metrics(self) -> dict[str, str]:
        """The metric of each validation set by its name; "" is all of them."""
        metrics = dict.fromkeys(name for line in self.lines for name in line if name.startswith(VALIDATION_LOSS))
        return {metric.removeprefix(VALIDATION_LOSS).removeprefix("/"): metric for metric in metrics}

    def total(self, metric: str) -> float:
        """The sum of `metric` over all lines."""
        return sum(value for _, value in self.curve(metric))


def read_run(folder: Path) -> Run:
    """The records of `folder`; raises KitError if it holds none."""
    with reading(folder / METRICS_FILE):
        lines = read_metrics(folder)
    if not lines:
        raise KitError(f"{folder / METRICS_FILE} holds no metrics yet: wait for the run's first log line")
    return Run(folder.resolve().name, lines, read_run_record(folder)["starts"])


def read_reference(text: str) -> tuple[str, float]:
    """(name, loss) of NAME=LOSS; raises KitError for other text."""
    name, _, loss = text.rpartition("=")
    try:
        if name and math.isfinite(float(loss)):
            return name, float(loss)
    except ValueError:
        pass
    raise KitError(f"--reference {text}: give a name and a loss, as trigrams=3.4")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file that have a string "output"; raises KitError if a line is no such row."""
    rows = []
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("output"), str):
            raise KitError(f'{path}, line {number}: not a row with an "output": give the file that 4_chat.sh wrote')
        rows.append(row)
    return rows


def smoothing(number: int) -> int:
    """How many neighbours on each side the moving average of so many points takes: none below 40, at most 100."""
    return min(round(WINDOW * number / 2 - 0.5), 100) if number >= 2 / WINDOW else 0


def smooth(points: Points, width: int | None = None) -> Points:
    """The mean of each of `points` and up to `width` neighbours on each side.

    As many on both sides: a falling curve is neither raised nor delayed. The first and last points are unchanged.
    """
    width = smoothing(len(points)) if width is None else width
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    found = []
    for number, (iteration, _) in enumerate(points):
        side = min(width, number, len(points) - 1 - number)
        found.append((iteration, (sums[number + side + 1] - sums[number - side]) / (2 * side + 1)))
    return found


def latest(points: Points) -> float:
    """The mean of the last points, as many as `smooth` takes."""
    last = points[-(2 * smoothing(len(points)) + 1) :]
    return sum(value for _, value in last) / len(last)


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most `limit` points: the means of groups of neighbours."""
    size = math.ceil(len(points) / limit)
    groups = [points[first : first + size] for first in range(0, len(points), size)] if size > 1 else []
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return means or points


def end_reason(run: Run) -> str | None:
    """Why the last start ended, in one line; None while it runs, or if it was killed."""
    end = run.starts[-1].get("end") if run.starts else None
    return None if end is None else one_line_reason(end)


def one_line_reason(end: dict[str, Any]) -> str:
    """The reason of a start's end, without the traceback that an error may have."""
    return str(end["reason"]).strip().splitlines()[-1]


def best_validation(run: Run, metric: str = VALIDATION_LOSS) -> str:
    """The lowest validation loss, of all sets or of the one with that metric, and its iteration."""
    iteration, loss = min(run.curve(metric), key=lambda point: point[1])
    return f"{loss:.4f} at iteration {iteration:,}"


def summary(run: Run) -> dict[str, str]:
    """What a reader asks first, by name: progress, losses, speed, time."""
    last_start = run.starts[-1] if run.starts else {}
    rates = [value for _, value in run.curve("tokens_per_s")]
    of = f" of {last_start['train_iters']:,}" if last_start else ""
    found = {"iteration": f"{run.lines[-1]['iteration']:,}{of}"}
    found["state"] = end_reason(run) or UNKNOWN_END
    if losses := run.curve("loss"):
        found["loss"] = f"{latest(losses):.4f}"
    for name, metric in run.validation_metrics.items():
        if run.curve(metric):
            found["best validation loss" + f", {name}" * bool(name)] = best_validation(run, metric)
    if rates:
        found["tokens/s"] = f"{median(rates):,.0f}"
        found["TFLOP/s per GPU"] = f"{median(value for _, value in run.curve('tflops_per_gpu')):.3g}"
    if memory := run.curve("memory_gib"):
        found["peak memory"] = f"{max(value for _, value in memory):.1f} GiB"
    found["evaluation, saving"] = f"{run.total('evaluation_s'):,.0f} s, {run.total('saving_s'):,.0f} s"
    found["starts"] = str(len(run.starts))
    if skipped := run.curve("skipped_steps"):
        found["skipped steps"] = f"{max(value for _, value in skipped):.0f}"
    return found


def different_settings(runs: list[Run]) -> dict[str, list[str]]:
    """The settings of the last starts that are not the same in all runs: name to values, in the order of `runs`."""
    settings = [run.starts[-1].get("settings", {}) if run.starts else {} for run in runs]
    names = sorted({name for each in settings for name in each})
    rows = {name: [str(each.get(name, "")) for each in settings] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}
