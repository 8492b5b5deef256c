"""Files written durably: flushed to the disk, and replaced atomically."""

import json
import os
from pathlib import Path
from typing import Any

NON_UTF8_NAMES = "backslashreplace"  # a non-UTF-8 byte of a path, a lone surrogate in Python, becomes \\udc.. in JSON
PARTIAL = ".partial"  # suffix of what is being written


def sync(path: Path) -> None:
    """Flushes a file's content, or the renames in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, content: bytes) -> None:
    """Writes `content` to `path` and flushes it to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`: a reader finds the old file or the new one, also after a power cut."""
    partial = path.with_name(path.name + PARTIAL)
    write_synced(partial, content)
    partial.replace(path)
    sync(path.parent)


def write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    """Replaces `path` by `value` as JSON, atomically."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors=NON_UTF8_NAMES))
