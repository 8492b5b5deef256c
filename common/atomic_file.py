"""Files that are written atomically and survive a power failure."""

import json
import os
from pathlib import Path
from typing import Any

NON_UTF8_NAMES = "backslashreplace"  # a non-UTF-8 byte of a path, a lone surrogate in Python, becomes \\udc.. in JSON


def sync(path: Path) -> None:
    """Flushes a file, or the renames in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    """Writes `value` to `path` atomically."""
    partial = Path(f"{path}.partial")
    with partial.open("w", encoding="utf-8", errors=NON_UTF8_NAMES) as stream:
        stream.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync(path.parent)
