"""Lines of jsonl to records."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from common.data.sources.bad_rows import BadRowError, BadRows, LongRowError
from common.data.sources.chunks import Chunk, read_chunks
from common.data.sources.file_format import BOM
from common.data.sources.row_blocks import MAX_ROW_BYTES, NEWLINE
from common.data.sources.spans import whole_spans
from common.errors import KitError

try:
    import orjson
except ModuleNotFoundError:  # the json module returns the same records, more slowly
    orjson = None  # type: ignore[assignment]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# All integers of this many digits fit into 64 bits; orjson returns a float for one that does not.
_DIGITS = bytes(0x30 if 0x30 <= byte < 0x3A else 0 for byte in range(256))
_EXACT_DIGITS = 18
# orjson's limit, enforced for the json module too, whose own limit depends on the Python version.
MAX_DEPTH = 1024
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def records(chunk: Chunk, counts: Counter[str], bad: BadRows | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset in the chunk, record) of each line; blank lines are counted.

    A line that is not a record is added to `bad`; without `bad` it raises KitError.
    """
    bad = bad or BadRows(chunk)
    offset = 0
    lines = _lines(chunk.data)
    for number, line in enumerate(lines, 1):
        content = line.removeprefix(BOM) if chunk.start + offset == 0 else line
        if content.strip():
            record = None
            with bad.row(offset):
                _check_length(chunk.cut if chunk.cut and number == len(lines) else len(line), chunk.max_row_bytes)
                record = parse(content)
            if record is not None:
                yield offset, record
        else:
            counts["blank lines"] += 1
        offset += len(line) + 1


def _check_length(num_bytes: int, max_row_bytes: int) -> None:
    if num_bytes > max_row_bytes:
        raise LongRowError(
            f"it has {num_bytes} bytes, and MAX_ROW_BYTES is {max_row_bytes}: split it, or increase MAX_ROW_BYTES;"
            " to encode a byte of text gigatoken needs some 10 bytes of memory, tokenizers 330"
        )


def _lines(data: bytes) -> list[bytes]:
    lines = data.split(NEWLINE)
    if not lines[-1]:
        lines.pop()  # nothing follows the last newline
    return lines


def fast_string_column(chunk: Chunk, name: str) -> list[str] | None:
    """The string in field `name` of each row; None when a row lacks one, so that `records` finds the cause."""
    if orjson is None or chunk.cut:
        return None
    # Views, not `split`: no line is copied.
    data, view, start, texts = chunk.data, memoryview(chunk.data), 0, []
    try:
        while start < len(data):
            end = data.find(NEWLINE, start)
            end = end if end >= 0 else len(data)
            if end - start > chunk.max_row_bytes:
                return None
            texts.append(orjson.loads(view[start:end])[name])
            start = end + 1
    except (ValueError, KeyError, TypeError):
        return None
    return texts if set(map(type, texts)) <= {str} else None


def first_rows(
    files: list[Path], skip: bool | None = None, max_row_bytes: int = MAX_ROW_BYTES
) -> Iterator[tuple[Chunk, int, dict[str, Any]]]:
    """(a chunk of one row, offset in it, record) of each row of `files`; with `skip` bad rows are skipped."""
    for file in files:
        (span,) = whole_spans([file], max_row_bytes)
        for chunk in read_chunks(span, 1):
            for offset, row in records(chunk, Counter(), BadRows(chunk, skip)):
                yield chunk, offset, row


def first_row(
    files: list[Path], skip: bool | None = None, max_row_bytes: int = MAX_ROW_BYTES
) -> tuple[Chunk, int, dict[str, Any]]:
    """The first of `first_rows`; raises KitError when there is none."""
    for found in first_rows(files, skip, max_row_bytes):
        return found
    raise KitError(f"INPUT holds no row: {', '.join(map(str, files))} are blank")


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object in `line`; raises BadRowError when it holds anything else.

    orjson parses first. Lines that it rejects or might round go to the json module, so both give the same record.
    """
    try:
        record = orjson.loads(line) if orjson and not _has_long_number(line) else _parse_with_json(line)
    except ValueError:
        record = _parse_with_json(line)
    if not isinstance(record, dict):
        raise BadRowError(f"it is a JSON {json_type(record)}, not an object: write one object a line")
    return record


def _has_long_number(line: bytes) -> bool:
    return b"0" * (_EXACT_DIGITS + 1) in line.translate(_DIGITS)


def _parse_with_json(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8: convert the file to UTF-8"
        ) from None
    try:
        with _raised_recursion_limit(line):
            record = json.loads(text)
            if _SURROGATE.search(line):
                json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRowError(r"it holds half of a surrogate pair (\ud800 to \udfff), which is not a character") from None
    except json.JSONDecodeError as error:
        raise BadRowError(_describe_json_error(text, error)) from None
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise BadRowError(f"it holds an integer of more than {most} digits: write it as a string") from None
    return record


@contextmanager
def _raised_recursion_limit(line: bytes) -> Iterator[None]:
    """Raises the recursion limit for the nesting of `line`; raises BadRowError when it is over MAX_DEPTH."""
    if line.count(b"[") + line.count(b"{") < MAX_DEPTH // 2:
        yield
        return
    steps = {0x5B: 1, 0x7B: 1, 0x5D: -1, 0x7D: -1}
    depth = max(accumulate(steps.get(byte, 0) for byte in _STRING.sub(b"", line)), default=0)
    if depth > MAX_DEPTH:
        raise BadRowError(f"its JSON is nested too deeply, more than {MAX_DEPTH} levels")
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(limit + 2 * MAX_DEPTH)
        yield
    finally:
        sys.setrecursionlimit(limit)


def _describe_json_error(text: str, error: ValueError) -> str:
    row = text.strip()
    if row.endswith(","):
        try:
            json.loads(row[:-1])
        except ValueError:
            pass
        else:
            return "a comma follows the object: in jsonl only newlines separate rows; remove the comma"
    if row in ("[", "]"):
        return "a JSON array is only read when it is the whole file"
    return f"it is not JSON ({error})"


def json_type(value: Any) -> str:
    """The JSON type of `value`."""
    names: dict[type, str] = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def string_field(record: dict[str, Any], name: str) -> str:
    """The string in field `name`; raises BadRowError when it is missing or not a string."""
    if name not in record:
        raise BadRowError(f"it has no field '{name}'; its fields are {', '.join(map(repr, record)) or 'none'}")
    value = record[name]
    if not isinstance(value, str):
        raise BadRowError(f"field '{name}' holds a JSON {json_type(value)}, not a string")
    return value
