"""The rejects file: a JSON line for each row that ON_ERROR=skip skipped, with its file, line and cause."""

import base64
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from common.data.sources.bad_rows import RejectedRow
from common.files import NON_UTF8_NAMES, sync


def rejects_path(output_prefix: Path) -> Path:
    """The rejects file of `output_prefix`; not a .jsonl file, which a run on the same folder would read."""
    return Path(f"{output_prefix}.rejects")


class RejectsWriter:
    """Writes the rejects of a part; the file gets its final name at the end of the context, if it is not empty.

    A row is stored with its span and its line in the span; `merge_rejects` computes the line in the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, Path(f"{path}.partial")
        self._stream: Any = None

    def add(self, span: int, lines: int, rejects: list[RejectedRow]) -> None:
        """Appends the `rejects` of a chunk that starts after `lines` lines of span number `span`."""
        if rejects and self._stream is None:
            self._stream = self._partial.open("w", encoding="utf-8", errors=NON_UTF8_NAMES)
        for reject in rejects:
            place = {"line": lines + reject.line + 1} if reject.element is None else {"element": reject.element}
            content = {"span": span, **place, "cause": reject.cause, **_row_of(reject)}
            self._stream.write(json.dumps(content, ensure_ascii=False) + "\n")

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


def _row_of(reject: RejectedRow) -> dict[str, str]:
    """The row as text, or in base64 when it is not UTF-8; only the head of a row that is too long."""
    name = "row" if reject.whole else "row_start"
    try:
        return {name: reject.row.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(reject.row).decode("ascii")}


def merge_rejects(parts: list[tuple[Path, list[dict[str, Any]]]], path: Path) -> None:
    """Writes the rejects of `parts`, in order, to `path`; without rejects no file is written.

    parts: for each its rejects file and the records of its spans, which give the file and line of a row.
    """
    before: Counter[int] = Counter()  # lines of each file
    partial = Path(f"{path}.partial")
    path.unlink(missing_ok=True)
    if not any(part.exists() for part, _ in parts):
        return
    with partial.open("w", encoding="utf-8", errors=NON_UTF8_NAMES) as stream:
        for part, records in parts:
            starts = []
            for record in records:
                starts.append(before[record["file"]])
                before[record["file"]] += record["lines"]
            for row in _rows(part):
                span = row.pop("span")
                if "line" in row:
                    row["line"] += starts[span]
                stream.write(json.dumps({"file": records[span]["path"], **row}, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _rows(part: Path) -> Iterator[dict[str, Any]]:
    if part.exists():
        with part.open("rb") as stream:
            yield from map(json.loads, stream)
