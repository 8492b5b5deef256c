"""One JSON array as rows: its elements one by one, in memory that does not grow with the file."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"[-+.eE0-9]+\Z")
_DECODER = json.JSONDecoder()


class ArrayError(Exception):
    """What is wrong with the array, at which element."""


def elements(stream: BinaryIO) -> Iterator[str]:
    """Each element of the array in `stream` as its JSON text on one line; raises ArrayError.

    A newline within an element is space between its tokens, since JSON strings hold none.
    """
    text = _Text(stream)
    text.skip()
    text.take("[")
    number = 1
    while True:
        text.skip()
        if text.peek() == "]" and number == 1:
            break
        yield text.element(number).replace("\r", " ").replace("\n", " ")
        text.skip()
        if text.peek() == "]":
            break
        if text.peek() != ",":
            raise ArrayError(f"after element {number} stands {text.shown()}, not a comma or the array's end")
        text.take(",")
        text.skip()
        if text.peek() == "]":
            raise ArrayError(f"a comma follows the last element, number {number}: remove the comma")
        number += 1
    text.take("]")
    text.skip()
    if text.peek():
        raise ArrayError(f"after the array's end stands {text.shown()}: a file is one array, or one row a line")


class _Text:
    """The text of a stream, of which only what is being read is kept."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._bytes, self._ended = "", 0, 0, False

    def _more(self, size: int = 0) -> bool:
        """Reads on; whether there was more."""
        if self._ended:
            return False
        block = self._stream.read(size or BLOCK)
        self._ended = not block
        try:
            new = self._decoder.decode(block, self._ended)
        except UnicodeDecodeError as error:
            where = self._bytes + len(block) - (len(error.object) - error.start)
            raise ArrayError(
                f"byte {error.object[error.start]:#04x} at offset {where} is not UTF-8: convert the file to UTF-8"
            ) from None
        self._bytes += len(block)
        self._text, self._at = self._text[self._at :] + new, 0
        return not self._ended

    def peek(self) -> str:
        """The next character, "" at the end."""
        while self._at == len(self._text) and self._more():
            pass
        return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Passes over space."""
        while self.peek():
            found = _SPACE.match(self._text, self._at)
            assert found
            self._at = found.end()
            if self._at < len(self._text):
                return

    def take(self, character: str) -> None:
        """Passes over `character`, which is next."""
        assert self.peek() == character
        self._at += 1

    def shown(self) -> str:
        """The beginning of what is next, for a message."""
        return repr(self._text[self._at : self._at + 40]) if self.peek() else "the end of the file"

    def element(self, number: int) -> str:
        """Passes over the JSON value that is next; returns its text."""
        size = BLOCK
        while True:
            failure = None
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
                if self._ended or not self._may_go_on(end):
                    break
            except RecursionError:
                raise ArrayError(f"element {number} is nested too deeply") from None
            except json.JSONDecodeError as error:
                failure = error
                if self._is_final(error):
                    raise ArrayError(self._told(number, error)) from None
            if not self._more(size) and failure is not None:
                raise ArrayError(self._told(number, failure)) from None
            size *= 2  # a long element is tried again a few times, not once a block
        start, self._at = self._at, end
        return self._text[start:end]

    def _may_go_on(self, end: int) -> bool:
        """Whether the value that ends at `end` may be the beginning of a longer one: a number at the text's end."""
        return end == len(self._text) or (
            self._text[self._at] in "-0123456789" and _NUMBER.match(self._text, end) is not None
        )

    def _is_final(self, error: json.JSONDecodeError) -> bool:
        """Whether no further text can mend `error`: it is not at the text's end, where a word may be cut in two."""
        return not error.msg.startswith("Unterminated string") and error.pos < len(self._text) - 16

    def _told(self, number: int, error: json.JSONDecodeError) -> str:
        near = self._text[max(self._at, error.pos - 30) : error.pos + 30]
        return f"element {number} is no JSON ({error.msg} at {near!r})"
