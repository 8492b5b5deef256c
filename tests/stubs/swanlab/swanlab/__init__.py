"""A stub of swanlab 0.10: the calls of the kit, written to LOG_DIR/NAME.jsonl, and only when the run is finished."""

import json
from pathlib import Path
from typing import Any


class Run:
    """Holds what it is given until `finish`."""

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        self.path, self.lines = path, lines

    def log(self, data: dict[str, Any], step: int) -> None:
        self.lines.append({"step": step, **data})

    def finish(self, state: str, error: str | None = None) -> None:
        assert state in ("success", "crashed", "aborted") and (error is None) == (state == "success")
        lines = [*self.lines, {"exit_code": int(state != "success")}]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def init(*, project: str, name: str, mode: str, log_dir: str, id: str, resume: str, config: dict[str, Any]) -> Run:
    first = {"project": project, "mode": mode, "id": id, "resume": resume, "lr": config["lr"]}
    return Run(Path(log_dir) / f"{name}.jsonl", [first])
