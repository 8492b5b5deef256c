"""Lines of jsonl to records, and what is said of a line that holds none."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.data.inputs import Chunk, Span, read_chunks
from common.errors import KitError

try:
    import orjson
except ModuleNotFoundError:  # the same records come out, slower
    orjson = None  # type: ignore[assignment]

BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BadRowError(Exception):
    """What is wrong with one row; whoever knows its place makes a KitError of it."""


def records(chunk: Chunk, counts: Counter[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset in the chunk, record) of each line; blank lines are counted. Raises KitError for a line that is none."""
    offset = 0
    lines = chunk.data.split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last newline is no line
    for line in lines:
        content = line.removeprefix(BOM) if chunk.start + offset == 0 else line
        if content.strip():
            try:
                record = parse(content)
            except BadRowError as error:
                raise chunk.error(offset, error) from None
            yield offset, record
        else:
            counts["blank lines"] += 1
        offset += len(line) + 1


def first_row(files: list[Path]) -> tuple[Chunk, int, dict[str, Any]]:
    """(a chunk of one line, offset in it, record) of the first row that `files` hold; raises KitError without any."""
    for file in files:
        whole = Span(file, 0, None if file.suffix == ".gz" else file.stat().st_size)
        for chunk in read_chunks(whole, 1):
            for offset, row in records(chunk, Counter()):
                return chunk, offset, row
    raise KitError(f"INPUT holds no row: {', '.join(map(str, files))} are blank")


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object that `line` is; raises BadRowError saying what it is instead.

    The fast parser reads first; what it refuses, the standard one judges, so both give the same text.
    """
    try:
        record = orjson.loads(line) if orjson else _load_slowly(line)
    except ValueError:
        record = _load_slowly(line)
    if not isinstance(record, dict):
        raise BadRowError(f"it is a JSON {_kind(record)}, not an object: write one object a line")
    return record


def _load_slowly(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8: convert the file to UTF-8"
        ) from None
    try:
        record = json.loads(text)
    except RecursionError:
        raise BadRowError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise BadRowError(_why_no_json(text, error)) from None
    if _SURROGATE.search(line):
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRowError(r"it holds half of a surrogate pair (\ud800 to \udfff), which is no character") from None
    return record


def _why_no_json(text: str, error: ValueError) -> str:
    row = text.strip()
    if row.endswith(","):
        try:
            json.loads(row[:-1])
        except ValueError:
            pass
        else:
            return "a comma follows the object: in jsonl rows are parted by newlines alone; remove the comma"
    if row in ("[", "]"):
        return "the file is one JSON array: write one object a line, without brackets and commas"
    return f"it is no JSON ({error})"


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def string_field(record: dict[str, Any], name: str) -> str:
    """The string in field `name`; raises BadRowError when there is none."""
    if name not in record:
        raise BadRowError(f"it has no field '{name}'; its fields are {', '.join(map(repr, record)) or 'none'}")
    value = record[name]
    if not isinstance(value, str):
        raise BadRowError(f"field '{name}' holds a JSON {_kind(value)}, not a string")
    return value


def _kind_name(value: Any) -> str:
    return "object" if isinstance(value, dict) else _kind(value)
