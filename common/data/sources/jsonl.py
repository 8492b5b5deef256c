"""Lines of jsonl to records, and what is said of a line that holds none."""

import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from common.data.sources.files import BOM
from common.data.sources.inputs import Chunk, read_chunks, whole_spans
from common.data.sources.reading import MAX_ROW_BYTES, NEWLINE, beginning
from common.errors import KitError

try:
    import orjson
except ModuleNotFoundError:  # the same records come out, slower
    orjson = None  # type: ignore[assignment]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Whole numbers of 64 bits have fewer digits; the fast parser makes a float of a longer one.
_DIGITS = bytes(0x30 if 0x30 <= byte < 0x3A else 0 for byte in range(256))
_EXACT_DIGITS = 18
# The fast parser's limit, held for the standard one too, whose own differs by the Python.
MAX_DEPTH = 1024
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class BadRowError(Exception):
    """What is wrong with one row; whoever knows its place makes a KitError of it."""


class LongRowError(BadRowError):
    """A row has more bytes than MAX_ROW_BYTES."""


@contextmanager
def one_row() -> Iterator[None]:
    """Makes a BadRowError of whatever one row raises in the block, as `bad_row` does."""
    try:
        yield
    except Exception as error:
        raise bad_row(error) from error


def bad_row(error: Exception) -> BadRowError:
    """`error` of one row as what is wrong with it: a template's own errors, what Python cannot hold.

    What is no row's fault is raised again: a KitError, a lack of memory.
    """
    if isinstance(error, BadRowError):
        return error
    if isinstance(error, (KitError, MemoryError)):
        raise error
    if isinstance(error, RecursionError):
        return BadRowError("it is nested too deeply")
    if isinstance(error, UnicodeEncodeError):
        return BadRowError(r"it holds half of a surrogate pair (\ud800 to \udfff), which is no character")
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    place = f"{Path(frame.f_code.co_filename).name}, line {line}"
    return BadRowError(f"it cannot be used: {type(error).__name__}: {str(error)[:300]} ({place})")


class Reject(NamedTuple):
    """A row that was not used: its line in its chunk, from 0; its bytes; why; of an array its element.

    whole: `row` is all of it, not its beginning.
    """

    line: int
    row: bytes
    cause: str
    element: int | None = None
    whole: bool = True


class BadRows:
    """What is done with a chunk's rows that cannot be used: the first is an error, or with `skip` all are kept.

    skip is what ON_ERROR says, or None where there is no such setting.
    """

    def __init__(self, chunk: Chunk, skip: bool | None = None) -> None:
        self._chunk, self._skip = chunk, skip
        self._counted = self._lines = 0  # so many bytes hold so many lines
        self.rows: list[Reject] = []

    @contextmanager
    def row(self, offset: int) -> Iterator[None]:
        """Notes what the row at `offset` raises in the block, as `add` does."""
        try:
            yield
        except Exception as error:
            self.add(offset, bad_row(error))

    def add(self, offset: int, error: BadRowError) -> None:
        """Notes the row at `offset`; raises KitError with file, line and cause unless bad rows are skipped."""
        if not self._skip:
            hint = "" if self._skip is None else " (ON_ERROR=skip leaves bad rows out and counts them)"
            raise self._chunk.error(offset, f"{error}{hint}") from None
        data, first = self._chunk.data, self._chunk.first_element
        if offset < self._counted:
            self._counted = self._lines = 0
        self._lines += data.count(NEWLINE, self._counted, offset)
        self._counted = offset
        end = data.find(NEWLINE, offset)
        row = data[offset : end if end >= 0 else len(data)]
        whole = not isinstance(error, LongRowError)
        row = row if whole else beginning(row, self._chunk.max_row_bytes)
        element = None if first is None else first + self._lines
        self.rows.append(Reject(self._lines, row, str(error), element, whole))


def records(chunk: Chunk, counts: Counter[str], bad: BadRows | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset in the chunk, record) of each line; blank lines are counted. Raises KitError for a line that is none.

    With `bad` it is noted there instead.
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
            f"it has {num_bytes} bytes, and MAX_ROW_BYTES is {max_row_bytes}: split it, or set MAX_ROW_BYTES higher;"
            " to encode a byte of text gigatoken needs some 10 bytes of memory, tokenizers 330"
        )


def _lines(data: bytes) -> list[bytes]:
    lines = data.split(NEWLINE)
    if not lines[-1]:
        lines.pop()  # what follows the last newline is no line
    return lines


def strings_at_once(chunk: Chunk, name: str) -> list[str] | None:
    """The string in field `name` of each row, fast; None when any row is not plainly that: `records` then tells."""
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
    """(a chunk of one row, offset in it, record) of each row of `files`; with `skip` bad rows are passed over."""
    for file in files:
        (span,) = whole_spans([file], max_row_bytes)
        for chunk in read_chunks(span, 1):
            for offset, row in records(chunk, Counter(), BadRows(chunk, skip)):
                yield chunk, offset, row


def first_row(
    files: list[Path], skip: bool | None = None, max_row_bytes: int = MAX_ROW_BYTES
) -> tuple[Chunk, int, dict[str, Any]]:
    """The first of `first_rows`; raises KitError without any."""
    for found in first_rows(files, skip, max_row_bytes):
        return found
    raise KitError(f"INPUT holds no row: {', '.join(map(str, files))} are blank")


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object that `line` is; raises BadRowError saying what it is instead.

    The fast parser reads first; what it refuses, or may round, the standard one judges: both give the same record.
    """
    try:
        record = orjson.loads(line) if orjson and not _has_long_number(line) else _load_slowly(line)
    except ValueError:
        record = _load_slowly(line)
    if not isinstance(record, dict):
        raise BadRowError(f"it is a JSON {kind_of_json(record)}, not an object: write one object a line")
    return record


def _has_long_number(line: bytes) -> bool:
    return b"0" * (_EXACT_DIGITS + 1) in line.translate(_DIGITS)


def _load_slowly(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8: convert the file to UTF-8"
        ) from None
    try:
        with _room_for(line):
            record = json.loads(text)
            if _SURROGATE.search(line):
                json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRowError(r"it holds half of a surrogate pair (\ud800 to \udfff), which is no character") from None
    except json.JSONDecodeError as error:
        raise BadRowError(_why_no_json(text, error)) from None
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise BadRowError(f"it holds a whole number of more than {most} digits: write it as a string") from None
    return record


@contextmanager
def _room_for(line: bytes) -> Iterator[None]:
    """Lets the parser go as deep as `line` is nested; raises BadRowError where that is too deep."""
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
        return "a JSON array is read only where the file is one array from its first character on"
    return f"it is no JSON ({error})"


def kind_of_json(value: Any) -> str:
    """What JSON calls `value`."""
    names: dict[type, str] = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def string_field(record: dict[str, Any], name: str) -> str:
    """The string in field `name`; raises BadRowError when there is none."""
    if name not in record:
        raise BadRowError(f"it has no field '{name}'; its fields are {', '.join(map(repr, record)) or 'none'}")
    value = record[name]
    if not isinstance(value, str):
        raise BadRowError(f"field '{name}' holds a JSON {kind_of_json(value)}, not a string")
    return value
