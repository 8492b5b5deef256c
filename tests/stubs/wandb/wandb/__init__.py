"""A stub of wandb: the calls of the kit, written to DIR/NAME.jsonl, and only when the run is finished."""

import json
from pathlib import Path
from typing import Any


class Run:
    """Holds what it is given until `finish`, as wandb loses what a killed process has not handed over."""

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        self.path, self.lines = path, lines

    def log(self, data: dict[str, Any], step: int) -> None:
        self.lines.append({"step": step, **data})

    def finish(self, exit_code: int) -> None:
        lines = [*self.lines, {"exit_code": exit_code}]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def init(*, project: str, name: str, mode: str, dir: str, id: str, resume: str, config: dict[str, Any]) -> Run:
    first = {"project": project, "mode": mode, "id": id, "resume": resume, "lr": config["lr"]}
    return Run(Path(dir) / f"{name}.jsonl", [first])
