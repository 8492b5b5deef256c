"""The format of an input file: plain or compressed; one JSON object a line, or one JSON array."""

from dataclasses import dataclass, field
from pathlib import Path

from common.data.sources.compression import MAGIC, decompressed, readable
from common.errors import KitError

BOM = b"\xef\xbb\xbf"
# The files that are read from a folder; a .json may be a manifest or a config.
ENDINGS = (".jsonl", *(f".jsonl.{compression}" for compression in MAGIC))
KINDS_OF_FILES = f".jsonl, plain or compressed ({', '.join(f'.{each}' for each in MAGIC)}), or a JSON array"
BLOCK = 1 << 17
# Formats that users pass by mistake: (magic number, name).
OTHER_FORMATS = (
    *((b"PAR1", "Parquet"), (b"ARROW1", "Arrow"), (b"FEA1", "Feather"), (b"\xff\xff\xff\xff", "an Arrow stream")),
    *((b"ORC", "ORC"), (b"Obj\x01", "Avro"), (b"\x89HDF", "HDF5"), (b"SQLite format 3", "SQLite")),
    *((b"PK\x03\x04", "zip"), (b"7z\xbc\xaf\x27\x1c", "7-Zip"), (b"Rar!", "RAR"), (b"\x04\x22\x4d\x18", "lz4")),
    *((b"\xff\x06\x00\x00sNaPpY", "snappy"), (b"LZIP", "lzip"), (b"\x1f\x9d", "compress"), (b"%PDF", "PDF")),
    *((b"\x93NUMPY", "NumPy"), (b"\x80\x02", "a pickle"), (b"\x80\x04", "a pickle"), (b"\x80\x05", "a pickle")),
    *((b"MMIDIDX", "a Megatron .idx file"), (b"\xff\xfe", "text in UTF-16"), (b"\xfe\xff", "text in UTF-16")),
)
TAR_OFFSET, TAR_MAGIC = 257, b"ustar"
HEAD_BYTES = TAR_OFFSET + len(TAR_MAGIC)


@dataclass(frozen=True)
class Layout:
    """How a file stores its rows.

    compression: "" or a key of MAGIC. array: the rows are elements of one JSON array instead of lines.
    short: the decompressed content is smaller than BLOCK bytes.
    """

    compression: str
    array: bool
    short: bool = field(default=False, compare=False)

    @property
    def sequential(self) -> bool:
        """Whether the file can only be read from its beginning."""
        return bool(self.compression) or self.array


def detect_layout(path: Path) -> Layout:
    """The layout of `path`, by its extension, magic number and first character.

    Raises KitError when the file cannot be read or holds another format.
    """
    with readable(path), path.open("rb") as raw:
        head = raw.read(HEAD_BYTES)
        raw.seek(0)
        compression = next(
            (name for name, magic in MAGIC.items() if path.suffix == f".{name}" or head.startswith(magic)), ""
        )
        stream, start = decompressed(raw, compression), b""
        block = stream.read(BLOCK)
        _reject_other_formats(path, block)
        short = len(block) < BLOCK
        while not start and block:
            start, block = block.removeprefix(BOM).lstrip(), stream.read(BLOCK)
    return Layout(compression, start.startswith(b"["), short)


def _reject_other_formats(path: Path, head: bytes) -> None:
    """Raises KitError when `head`, the first decompressed bytes of `path`, is not UTF-8 text."""
    kind = next((name for magic, name in OTHER_FORMATS if head.startswith(magic)), "")
    if head[TAR_OFFSET:HEAD_BYTES] == TAR_MAGIC:
        kind = "tar"
    if b"\0" in head[:2]:
        kind = kind or "binary data, or text in UTF-16"
    if kind:
        raise KitError(f"{path} is {kind}, which is not supported: write it as jsonl in UTF-8, one JSON object a line")
