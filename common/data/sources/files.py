"""How an input file lies on disk: plain or compressed; rows a line each, or one JSON array."""

import bz2
import gzip
import importlib
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import KitError

BOM = b"\xef\xbb\xbf"
# An ending or these first bytes say how a file is compressed: RFC 1952, RFC 8878 (a frame, or one of those to be
# skipped, which parallel compressors begin with), bzip2's and xz's own. Longer than two bytes: no row begins so.
MAGIC = {
    "gz": (b"\x1f\x8b",),
    "zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),
    "bz2": (b"BZh",),
    "xz": (b"\xfd7zXZ\x00",),
}
# In a folder these alone are rows: a .json may be a manifest, or a config.
ENDINGS = (".jsonl", *(f".jsonl.{compression}" for compression in MAGIC))
KINDS_OF_FILES = f".jsonl, plain or compressed ({', '.join(f'.{each}' for each in MAGIC)}), or a JSON array"
BLOCK = 1 << 17
# What else is taken for rows: the first bytes of each, and its name.
FOREIGN = (
    *((b"PAR1", "Parquet"), (b"ARROW1", "Arrow"), (b"FEA1", "Feather"), (b"\xff\xff\xff\xff", "an Arrow stream")),
    *((b"ORC", "ORC"), (b"Obj\x01", "Avro"), (b"\x89HDF", "HDF5"), (b"SQLite format 3", "SQLite")),
    *((b"PK\x03\x04", "zip"), (b"7z\xbc\xaf\x27\x1c", "7-Zip"), (b"Rar!", "RAR"), (b"\x04\x22\x4d\x18", "lz4")),
    *((b"\xff\x06\x00\x00sNaPpY", "snappy"), (b"LZIP", "lzip"), (b"\x1f\x9d", "compress"), (b"%PDF", "PDF")),
    *((b"\x93NUMPY", "NumPy"), (b"\x80\x02", "a pickle"), (b"\x80\x04", "a pickle"), (b"\x80\x05", "a pickle")),
    *((b"MMIDIDX", "an .idx of Megatron"), (b"\xff\xfe", "text in UTF-16"), (b"\xfe\xff", "text in UTF-16")),
)
TAR_AT, TAR = 257, b"ustar"
HEAD_BYTES = TAR_AT + len(TAR)


@dataclass(frozen=True)
class Layout:
    """compression: "" or one of MAGIC; array: the rows are the elements of one JSON array, not lines.

    short: it holds less than BLOCK bytes, inflated.
    """

    compression: str
    array: bool
    short: bool = field(default=False, compare=False)

    @property
    def whole(self) -> bool:
        """Whether the file can be read from its beginning only."""
        return bool(self.compression) or self.array


def layout_of(path: Path) -> Layout:
    """What `path` is, by its ending, its magic number and its first character; raises KitError when it is not read."""
    with readable(path), path.open("rb") as raw:
        head = raw.read(HEAD_BYTES)
        raw.seek(0)
        compression = next(
            (name for name, magic in MAGIC.items() if path.suffix == f".{name}" or head.startswith(magic)), ""
        )
        stream, start = decompressed(raw, compression), b""
        block = stream.read(BLOCK)
        _refuse_foreign(path, block)
        short = len(block) < BLOCK
        while not start and block:
            start, block = block.removeprefix(BOM).lstrip(), stream.read(BLOCK)
    return Layout(compression, start.startswith(b"["), short)


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Raises KitError when the bytes that a file begins with, once inflated, are not those of text in UTF-8."""
    kind = next((name for magic, name in FOREIGN if head.startswith(magic)), "")
    if head[TAR_AT:HEAD_BYTES] == TAR:
        kind = "tar"
    if b"\0" in head[:2]:
        kind = kind or "binary data, or text in UTF-16"
    if kind:
        raise KitError(f"{path} is {kind}, which is not read: write it as jsonl in UTF-8, one JSON object a line")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong with the bytes of `path` within becomes a KitError that names it."""
    try:
        yield
    except MemoryError as error:
        raise KitError(f"{path} cannot be read: it needs more memory than there is") from error
    except _errors() as error:
        raise KitError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def decompressed(raw: BinaryIO, compression: str) -> Any:
    """A binary stream of what `raw` holds, all frames or members of it; it is read within `readable`."""
    if compression == "gz":
        igzip = _library("isal.igzip")  # three times as fast
        return igzip.IGzipFile(fileobj=raw, mode="rb") if igzip else gzip.GzipFile(fileobj=raw)
    if compression == "zst":
        zstd = _zstd()
        if not zstd:
            raise KitError("a .zst file needs the package backports.zstd: install the kit's requirements")
        # A window as large as the format's tools make one (zstd --long=31).
        return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31})
    if compression == "bz2":
        return bz2.BZ2File(raw)
    return lzma.LZMAFile(raw) if compression == "xz" else raw


def _library(name: str) -> Any:
    """The module `name`, None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _zstd() -> Any:
    """The standard library's zstd, which Python has from 3.14 on, or what brings it to those before."""
    return _library("compression.zstd") or _library("backports.zstd")


def _errors() -> tuple[type[Exception], ...]:
    """What reading raises where a file is damaged, cut short, or may not be read."""
    zstd, isal = _zstd(), _library("isal.isal_zlib")
    libraries = [*([zstd.ZstdError] if zstd else []), *([isal.error] if isal else [])]
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *libraries)
