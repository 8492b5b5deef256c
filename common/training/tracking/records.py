"""Reads the records of a run back: metrics.jsonl and run.json."""

import json
from pathlib import Path
from typing import Any

from common.checkpoint.formats.model_files import RUN_FILES
from common.errors import KitError

VALIDATION_LOSS = "validation_loss"  # the metric; of a set with a name, followed by / and the name
VALIDATION_ACCURACY = "validation_accuracy"  # of preferences, named like the loss
LOG_FILE, METRICS_FILE, RUN_RECORD, TENSORBOARD_FOLDER, _ = RUN_FILES


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


def read_run_record(folder: Path) -> dict[str, Any]:
    """The content of `folder`/run.json: `starts`, a list of descriptions; without starts if there is no such file.

    Raises KitError if the file is not a run record.
    """
    path = folder / RUN_RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"starts": []}
    except ValueError as error:
        raise KitError(f"{path} is not JSON ({error}): move it away") from error
    if not isinstance(content, dict) or not isinstance(content.get("starts"), list):
        raise KitError(f'{path} is not a run record with "starts": move it away')
    return content
