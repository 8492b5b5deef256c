"""How an input file lies on disk: plain, gzip or zstd; rows a line each, or one JSON array."""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import KitError

BOM = b"\xef\xbb\xbf"
MAGIC = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd"}
# In a folder these alone are rows: a .json may be a manifest, or a config.
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BLOCK = 1 << 17


@dataclass(frozen=True)
class Layout:
    """compression: "", "gz" or "zst"; array: the rows are the elements of one JSON array, not lines."""

    compression: str
    array: bool

    @property
    def whole(self) -> bool:
        """Whether the file can be read from its beginning only."""
        return bool(self.compression) or self.array


def layout_of(path: Path) -> Layout:
    """What `path` is, by its ending, its magic number and its first character; raises KitError when it is not read."""
    try:
        with path.open("rb") as raw:
            head = raw.read(4)
            compression = next(
                (name for name, magic in MAGIC.items() if path.suffix == f".{name}" or head.startswith(magic)), ""
            )
            raw.seek(0)
            stream, start = decompressed(raw, compression), b""
            while not start and (block := stream.read(BLOCK)):
                start = block.removeprefix(BOM).lstrip()
    except (OSError, EOFError) as error:
        raise KitError(f"{path} cannot be read: {_cause(error)}") from error
    return Layout(compression, start.startswith(b"["))


def _cause(error: Exception) -> object:
    return getattr(error, "strerror", None) or error


def decompressed(raw: BinaryIO, compression: str) -> Any:
    """A binary stream of what `raw` holds; reading raises OSError or EOFError where it is damaged or cut short."""
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "zst":
        return io.BufferedReader(_Zstd(raw), BLOCK)
    return raw


class _Zstd(io.RawIOBase):
    """The frames of a zstd file; zstandard's own reader gives no error where the last one is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise KitError("a .zst file needs the package zstandard: install the kit's requirements") from error
        self._library, self._raw = zstandard, raw
        self._frame: Any = None
        self._given, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._given and not (block := self._raw.read(BLOCK)):
                if self._frame is not None:
                    raise EOFError("it ends within a zstd frame: it was cut short")
                return 0
            self._given = self._given or block
            self._decompress()
        number = min(len(buffer), len(self._ready))
        buffer[:number], self._ready = self._ready[:number], self._ready[number:]
        return number

    def _decompress(self) -> None:
        """Turns what was given into what is ready, up to the end of a frame."""
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            self._ready = self._frame.decompress(self._given)
        except self._library.ZstdError as error:
            raise OSError(f"it is no zstd data ({error})") from error
        self._given = b""
        if self._frame.eof:
            self._given, self._frame = self._frame.unused_data, None
