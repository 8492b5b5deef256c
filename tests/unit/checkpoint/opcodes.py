"""Pickles put together opcode by opcode, as no pickler writes them, and archives with them."""

import io
import struct
import zipfile
from typing import Any

PROTOCOL = b"\x80\x04"


def word(text: str) -> bytes:
    """A string."""
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """An integer of 8 bytes."""
    return b"\x8a\x08" + struct.pack("<q", value)


def named(module: str, name: str) -> bytes:
    """A global; dots in `name` are looked up one by one."""
    return word(module) + word(name) + b"\x93"


def several(*values: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    """The result of calling `function`."""
    return function + several(*arguments) + b"R"


def entry(name: bytes, value: bytes) -> bytes:
    """A dict of one entry."""
    return b"}" + name + value + b"s"


def pickled(value: bytes) -> bytes:
    """The pickle of `value`."""
    return PROTOCOL + value + b"."


def archive(value: bytes, **records: bytes) -> bytes:
    """`value`, pickled, as torch.save writes it, and other records beside it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", pickled(value))
        file.writestr("archive/version", "3\n")
        for name, data in records.items():
            file.writestr(f"archive/{name}", data)
    return stream.getvalue()


class Runs:
    """Is rebuilt by calling `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made_by = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made_by
