"""The rejects file: a line of JSON for each row that ON_ERROR=skip left out, with its file, its place and the cause."""

import base64
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from common.data.indexed import sync
from common.data.inputs import Chunk, Lines, Task, load
from common.data.jsonl import Reject
from common.data.manifest import OF_NAMES


def rejects_path(output_prefix: Path) -> Path:
    """Where the rejects of `output_prefix` stand; not a .jsonl, which a run over the same folder would read."""
    return Path(f"{output_prefix}.rejects")


class RejectsWriter:
    """Writes one rejects file; it gets its final name when the context ends well, and only if it holds a row."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, Path(f"{path}.partial")
        self._stream: Any = None
        self._lines: dict[Path, Lines] = {}

    def add(self, task: Task, rejects: list[Reject]) -> None:
        """Appends the rejects of `task`."""
        if rejects and self._stream is None:
            self._stream = self._partial.open("w", encoding="utf-8", errors=OF_NAMES)
        chunk = load(task) if rejects else None
        for reject in rejects:
            assert chunk
            place = self._place(chunk, reject.offset)
            told = {"file": str(task.path), **place, "cause": reject.cause, **_shown(reject)}
            self._stream.write(json.dumps(told, ensure_ascii=False) + "\n")

    def _place(self, chunk: Chunk, offset: int) -> dict[str, int]:
        if chunk.first_element is not None:
            return {"element": int(chunk.place(offset).split()[-1])}
        lines = self._lines.setdefault(chunk.path, Lines(chunk.path))
        return {"line": lines.number_at(chunk.start + offset)}

    def __enter__(self) -> "RejectsWriter":
        self._path.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._stream is None:
            return
        try:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._partial.replace(self._path)
                sync(self._path.parent)
        finally:
            self._stream.close()
            self._partial.unlink(missing_ok=True)


def _shown(reject: Reject) -> dict[str, str]:
    """The row as text, or in base64 where it is not UTF-8: nothing of it is lost but where it is too long."""
    name = "row" if reject.whole else "row_start"
    try:
        return {name: reject.row.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(reject.row).decode("ascii")}


def join(parts: list[Path], path: Path) -> None:
    """Writes the rejects of `parts`, in order, to `path`; none of them makes no file."""
    there = [part for part in parts if part.exists()]
    if not there:
        path.unlink(missing_ok=True)
        return
    partial = Path(f"{path}.partial")
    with partial.open("wb") as stream:
        for part in there:
            stream.write(part.read_bytes())
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
