"""One JSON array as rows: its elements one by one, in memory that grows with neither the file nor an element."""

import json
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from common.data.sources.files import BOM

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
    """What is wrong with the array, at which element."""


class Element(NamedTuple):
    """An element's JSON text on one line, and its length in bytes; of one that is too long only the beginning."""

    text: bytes
    length: int


def elements(stream: BinaryIO, max_bytes: int) -> Iterator[Element]:
    """The elements of the array in `stream`; raises ArrayError where its structure is broken.

    What is wrong within an element is left to whoever parses it, as long as it is clear where the element ends. A
    newline within an element is space between its tokens, since JSON strings hold none.
    """
    text = _Text(stream)
    text.skip()
    if text.peek() != b"[":
        raise ArrayError(f"it begins with {text.shown()}, which is no JSON: remove what stands before the array")
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
            raise ArrayError(f"after element {number} stands {text.shown()}, not a comma or the array's end")
        text.take(b",")
        text.skip()
        if text.peek() == b"]":
            raise ArrayError(f"a comma follows the last element, number {number}: remove the comma")
        number += 1
    text.take(b"]")
    text.skip()
    if text.peek():
        raise ArrayError(f"after the array's end stands {text.shown()}: a file is one array, or one row a line")


class _Text:
    """The bytes of a stream, of which only what is being read is kept."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._data, self._at, self._size = b"", 0, BLOCK
        self._more()
        while BOM.startswith(self._data[: len(BOM)]) and len(self._data) < len(BOM) and self._more():
            pass
        self._data = self._data.removeprefix(BOM)

    def _more(self) -> bool:
        """Reads on; whether there was more. A long element is read in ever larger pieces, so that few are joined."""
        block = self._stream.read(self._size)
        self._data, self._at = self._data[self._at :] + block, 0
        return bool(block)

    def peek(self) -> bytes:
        """The next byte, none at the end."""
        while self._at == len(self._data) and self._more():
            pass
        return self._data[self._at : self._at + 1]

    def skip(self) -> None:
        """Passes over space."""
        while self.peek():
            found = _SPACE.match(self._data, self._at)
            assert found
            self._at = found.end()
            if self._at < len(self._data):
                return

    def take(self, byte: bytes) -> None:
        """Passes over `byte`, which is next."""
        assert self.peek() == byte
        self._at += 1

    def shown(self) -> str:
        """The beginning of what is next, for a message."""
        return (
            repr(self._data[self._at : self._at + 40].decode(errors="replace"))
            if self.peek()
            else "the end of the file"
        )

    def element(self, number: int, max_bytes: int) -> Element:
        """Passes over the value that is next."""
        self._size, walk = BLOCK, _Walk()
        head, left_out = b"", 0
        while (end := walk.end(self._data, self._at)) is None:
            if len(self._data) - self._at > max_bytes:
                head = head or self._data[self._at : self._at + KEPT_BYTES]
                kept = walk.forget(self._data)
                left_out += len(self._data) - self._at - len(kept)
                self._data, self._at = kept, 0
            elif not head:
                self._size = min(2 * self._size, MAX_BLOCK)
            if not self._more():
                end = self._at_end(number, walk, bool(head))
                break
        text, self._at, self._size = self._data[self._at : end], end, BLOCK
        length = left_out + len(text)
        if length > max_bytes:
            return Element(_on_one_line((head or text)[:KEPT_BYTES]), length)
        _check(number, text)
        return Element(_on_one_line(text), length)

    def _at_end(self, number: int, walk: "_Walk", cut: bool) -> int:
        """Where a value ends that nothing follows; raises ArrayError where it is none."""
        if walk.scalar and not cut:
            return len(self._data)
        if not cut:
            _check(number, self._data[self._at :])
        raise ArrayError(f"element {number} is no JSON: the file ends within it")


class _Walk:
    """Where a value ends, by its brackets and quotes; taken up again when more of it was read."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._string, self._done, self._begun = 0, False, 0, 0, False
        self.scalar = False

    def end(self, data: bytes, start: int) -> int | None:
        """Where the value that begins at data[start] ends; None when `data` ends before.

        What was looked at once is not looked at again; the value must begin at 0 when it is asked for once more.
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
        """What must stand before the rest of the value when `data` is dropped: a backslash that escapes it."""
        kept = b"\\" if self._in_string and self._is_escaped(data, len(data)) else b""
        self._done, self._string = len(kept), 0
        return kept


def _on_one_line(text: bytes) -> bytes:
    return text.replace(b"\r", b" ").replace(b"\n", b" ")


def _check(number: int, text: bytes) -> None:
    """Raises ArrayError unless `text` is JSON in form: else it may not be clear where the element ends."""
    if orjson:
        try:
            orjson.loads(text)
            return
        except ValueError:
            pass  # the standard parser judges
    try:
        json.loads(text.decode(errors="replace"))
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 30) : error.pos + 30]
        raise ArrayError(f"element {number} is no JSON ({error.msg} at {near!r})") from None
    except (ValueError, RecursionError):
        pass  # a number of too many digits, or too deep: the row is bad, the array is whole
