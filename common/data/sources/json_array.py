"""A streaming reader of one JSON array; memory grows with neither the file nor an element.

Hand-written: ijson yields Python objects instead of an element's text and sets no limit on its size; orjson needs the
whole file in memory.
"""

import json
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from common.data.sources.file_format import BOM

try:
    import orjson
except ModuleNotFoundError:  # the same elements come out, slower
    orjson = None  # type: ignore[assignment]

BLOCK, MAX_BLOCK = 1 << 20, 4 << 20
KEPT_BYTES = 1 << 10  # of a row that is too long
_SPACE = re.compile(rb"[ \t\r\n]*")
_STRUCTURE = re.compile(rb'["{}\[\]]')
_SCALAR_END = re.compile(rb"[ \t\r\n,\]}]")


class ArrayError(Exception):
    """A malformed array: what is wrong, and at which element."""


class Element(NamedTuple):
    """An element's JSON text on one line and its length in bytes; `text` is only the head of one that is too long."""

    text: bytes
    length: int


def elements(stream: BinaryIO, max_bytes: int) -> Iterator[Element]:
    """The elements of the array in `stream`; raises ArrayError when its structure is malformed.

    Errors inside an element are left to its parser, as long as its end is clear. A newline inside an element is white
    space, since JSON strings cannot contain one.
    """
    text = _Text(stream)
    text.skip()
    if text.peek() != b"[":
        raise ArrayError(f"it begins with {text.preview()}, which is not JSON: remove what precedes the array")
    text.take(b"[")
    number = 1
    while True:
        text.skip()
        if text.peek() == b"]" and number == 1:
            break
        yield text.element(number, max_bytes)
        text.skip()
        if text.peek() == b"]":
            break
        if text.peek() != b",":
            raise ArrayError(
                f"element {number} is followed by {text.preview()}, not by a comma or the end of the array"
            )
        text.take(b",")
        text.skip()
        if text.peek() == b"]":
            raise ArrayError(f"a comma follows the last element, number {number}: remove the comma")
        number += 1
    text.take(b"]")
    text.skip()
    if text.peek():
        raise ArrayError(f"the array is followed by {text.preview()}: a file holds one array, or one row a line")


class _Text:
    """A stream's bytes; only the part that is being read stays in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._data, self._at, self._size = b"", 0, BLOCK
        self._more()
        while BOM.startswith(self._data[: len(BOM)]) and len(self._data) < len(BOM) and self._more():
            pass
        self._data = self._data.removeprefix(BOM)

    def _more(self) -> bool:
        """Reads the next block; False at the end. Blocks of a long element grow, so that few are concatenated."""
        block = self._stream.read(self._size)
        self._data, self._at = self._data[self._at :] + block, 0
        return bool(block)

    def peek(self) -> bytes:
        """The next byte, empty at the end."""
        while self._at == len(self._data) and self._more():
            pass
        return self._data[self._at : self._at + 1]

    def skip(self) -> None:
        """Skips white space."""
        while self.peek():
            found = _SPACE.match(self._data, self._at)
            assert found
            self._at = found.end()
            if self._at < len(self._data):
                return

    def take(self, byte: bytes) -> None:
        """Consumes `byte`, which must be next."""
        assert self.peek() == byte
        self._at += 1

    def preview(self) -> str:
        """The next characters, for an error message."""
        return (
            repr(self._data[self._at : self._at + 40].decode(errors="replace"))
            if self.peek()
            else "the end of the file"
        )

    def element(self, number: int, max_bytes: int) -> Element:
        """Consumes the next value and returns it."""
        self._size, scanner = BLOCK, _ValueScanner()
        head, left_out = b"", 0
        while (end := scanner.end(self._data, self._at)) is None:
            if len(self._data) - self._at > max_bytes:
                head = head or self._data[self._at : self._at + KEPT_BYTES]
                kept = scanner.forget(self._data)
                left_out += len(self._data) - self._at - len(kept)
                self._data, self._at = kept, 0
            elif not head:
                self._size = min(2 * self._size, MAX_BLOCK)
            if not self._more():
                end = self._end_of_file(number, scanner, bool(head))
                break
        text, self._at, self._size = self._data[self._at : end], end, BLOCK
        length = left_out + len(text)
        if length > max_bytes:
            return Element(_on_one_line((head or text)[:KEPT_BYTES]), length)
        _check(number, text)
        return Element(_on_one_line(text), length)

    def _end_of_file(self, number: int, scanner: "_ValueScanner", cut: bool) -> int:
        """Where the value ends at the end of the file; raises ArrayError when it is incomplete."""
        if scanner.scalar and not cut:
            return len(self._data)
        if not cut:
            _check(number, self._data[self._at :])
        raise ArrayError(f"element {number} is not JSON: the file ends within it")


class _ValueScanner:
    """Finds where a value ends, by its brackets and quotes; resumes as more of it is read."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._string, self._done, self._begun = 0, False, 0, 0, False
        self.scalar = False

    def end(self, data: bytes, start: int) -> int | None:
        """Where the value that begins at data[start] ends; None when `data` ends first.

        No byte is scanned twice: on the next call the value must begin at 0.
        """
        at = max(self._done, start)
        if not self._begun:
            self._begun, self.scalar = True, data[start : start + 1] not in (b"{", b"[", b'"')
        if self.scalar:
            found = _SCALAR_END.search(data, at)
            self._done = len(data) - start
            return found.start() if found else None
        while True:
            if self._in_string:
                quote = data.find(b'"', at)
                if quote < 0:
                    break
                at = quote + 1
                if self._is_escaped(data, quote):
                    continue
                self._in_string = False
            else:
                found = _STRUCTURE.search(data, at)
                if not found:
                    break
                at = found.end()
                mark = found.group()
                if mark == b'"':
                    self._in_string, self._string = True, at
                    continue
                self._depth += 1 if mark in b"{[" else -1
            if self._depth == 0:
                return at
        self._done, self._string = len(data) - start, max(0, self._string - start)
        return None

    def _is_escaped(self, data: bytes, quote: int) -> bool:
        first = quote
        while first > self._string and data[first - 1] == 0x5C:
            first -= 1
        return (quote - first) % 2 == 1

    def forget(self, data: bytes) -> bytes:
        """The bytes to keep when `data` is dropped: a backslash that escapes the next byte."""
        kept = b"\\" if self._in_string and self._is_escaped(data, len(data)) else b""
        self._done, self._string = len(kept), 0
        return kept


def _on_one_line(text: bytes) -> bytes:
    return text.replace(b"\r", b" ").replace(b"\n", b" ")


def _check(number: int, text: bytes) -> None:
    """Raises ArrayError unless `text` is well-formed JSON: otherwise its end may be wrong."""
    if orjson:
        try:
            orjson.loads(text)
            return
        except ValueError:
            pass  # the json module decides
    try:
        json.loads(text.decode(errors="replace"))
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 30) : error.pos + 30]
        raise ArrayError(f"element {number} is not JSON ({error.msg} at {near!r})") from None
    except (ValueError, RecursionError):
        pass  # too many digits or too deep: a bad row in an intact array
