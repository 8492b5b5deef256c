"""Decompression of input files: gzip, Zstandard, bzip2 and xz."""

import bz2
import gzip
import importlib
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import KitError

# Extension to magic numbers: RFC 1952; RFC 8878 (a frame, or a skippable frame, which parallel compressors write
# first); bzip2; xz.
MAGIC = {
    "gz": (b"\x1f\x8b",),
    "zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),
    "bz2": (b"BZh",),
    "xz": (b"\xfd7zXZ\x00",),
}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns errors of reading or decompressing `path` into a KitError that names the file."""
    try:
        yield
    except MemoryError as error:
        raise KitError(f"{path} cannot be read: not enough memory") from error
    except _errors() as error:
        raise KitError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def decompressed(raw: BinaryIO, compression: str) -> Any:
    """A binary stream of the decompressed content of `raw`, all frames or members; read it inside `readable`."""
    if compression == "gz":
        igzip = _library("isal.igzip")  # three times as fast
        return igzip.IGzipFile(fileobj=raw, mode="rb") if igzip else gzip.GzipFile(fileobj=raw)
    if compression == "zst":
        zstd = _zstd()
        if not zstd:
            raise KitError("a .zst file needs the package backports.zstd: install the kit's requirements")
        # The largest window that the zstd command writes (--long=31).
        return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31})
    if compression == "bz2":
        return bz2.BZ2File(raw)
    return lzma.LZMAFile(raw) if compression == "xz" else raw


def _library(name: str) -> Any:
    """The module `name`, or None when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _zstd() -> Any:
    """The zstd module of Python 3.14, or its backport."""
    return _library("compression.zstd") or _library("backports.zstd")


def _errors() -> tuple[type[Exception], ...]:
    """The exceptions of a file that is damaged, truncated or unreadable."""
    zstd, isal = _zstd(), _library("isal.isal_zlib")
    libraries = [*([zstd.ZstdError] if zstd else []), *([isal.error] if isal else [])]
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *libraries)
