"""The records of a zip of torch.save, found in the one place where any reader finds them.

zipfile and torch's own reader (miniz) differ on odd zips: bytes before the first record, two records of one name, an
end that stands twice. What one of them takes for the pickle need not be what the other does. So a zip is read only
where it is laid down as torch does it: records that are stored, the directory behind them, its end behind that.
Source of the layout: caffe2/serialize/inline_container.cc, third_party/miniz-*/miniz.c.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_END = struct.Struct("<4s4H2IH")  # PK\5\6, disks, entries twice, size and start of the directory, comment
_LOCATOR = struct.Struct("<4sIQI")  # PK\6\7, disk, where the wide end is, number of disks
_WIDE_END = struct.Struct("<4sQ2H2I4Q")  # PK\6\6, its size, versions, disks, entries twice, size and start
_ENTRY = struct.Struct("<4s6H3I5H2I")
_HEADER = struct.Struct("<4s5H3I2H")
_FLAGS = 0x808  # sizes and checksum behind the data, the name in UTF-8
_NAME = re.compile(r"([^/\0]+)/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|"
                   r"\.data/serialization_id|data/[\w.-]+)")  # fmt: skip
_TAIL_BYTES = 4096  # holds the directory of a few tensors

Read = Callable[[int, int], bytes]  # the bytes at a place, so many


@dataclass(frozen=True)
class Record:
    """A record: where its header is, the size of its data and their CRC-32."""

    name: bytes
    start: int
    size: int
    checksum: int


def read_records(read: Read, length: int) -> dict[str, Record]:
    """The records of a zip of `length` bytes by their names inside its folder: data.pkl, data/0, ...

    Raises ValueError where it is no zip, or one that torch.save would not write.
    """
    tail_start = max(length - _TAIL_BYTES, 0)
    tail = read(tail_start, length - tail_start)
    start, size, count = _directory(tail, length)
    directory = tail[start - tail_start :][:size] if start >= tail_start else read(start, size)
    if read(0, 4) != b"PK\3\4" or len(directory) != size:
        raise ValueError("it is no zip")
    records: dict[str, Record] = {}
    folders, place = set(), 0
    while place < size:
        record, place = _entry(directory, place)
        found = _NAME.fullmatch(record.name.decode("ascii"))
        if found is None or found[2].lower() in records:
            raise ValueError(f"its record {record.name!r} is one that torch.save does not write, or is there twice")
        records[found[2].lower()] = record
        folders.add(found[1])
    if len(folders) != 1 or len(records) != count or "data.pkl" not in records:
        raise ValueError("its directory does not hold one data.pkl and what belongs to it")
    if sum(record.size for record in records.values()) > start or any(r.start >= start for r in records.values()):
        raise ValueError("its records are larger than it is")
    return {record.name.decode().partition("/")[2]: record for record in records.values()}


def read_data_start(read: Read, record: Record) -> int:
    """Where the data of `record` begins; raises ValueError where its header is not that of the directory."""
    header = read(record.start, _HEADER.size + len(record.name))
    if len(header) == _HEADER.size + len(record.name):
        mark, _, flags, method, *_, name_length, extra_length = _HEADER.unpack_from(header)
        same = header[_HEADER.size :] == record.name and name_length == len(record.name)
        if mark == b"PK\3\4" and same and not (method or flags & ~_FLAGS):
            return record.start + len(header) + extra_length
    raise ValueError(f"the header of its record {record.name!r} does not belong to its directory")


def _directory(tail: bytes, length: int) -> tuple[int, int, int]:
    """Start, size and number of entries of the directory of a zip that ends in `tail`."""
    if len(tail) < _END.size:
        raise ValueError("it is no zip")
    mark, *disks, here, count, size, start, comment = _END.unpack(tail[-_END.size :])
    if mark != b"PK\5\6":
        raise ValueError("it does not end as a zip does")
    before, end = tail[: -_END.size], length - _END.size
    if before[-_LOCATOR.size :][:4] == b"PK\6\7":
        shown = (here, count, size, start)
        end -= _LOCATOR.size + _WIDE_END.size
        mark, own, _, _, *wide_disks, here, count, size, start = _WIDE_END.unpack(
            before[-_LOCATOR.size - _WIDE_END.size : -_LOCATOR.size]
        )
        place = _LOCATOR.unpack(before[-_LOCATOR.size :])[1:]
        cut = (min(here, _MAX16), min(count, _MAX16), min(size, _MAX32), min(start, _MAX32))
        if (mark, own, place, cut) != (b"PK\6\6", _WIDE_END.size - 12, (0, end, 1), shown):
            raise ValueError("its two ends contradict each other")
        disks += wide_disks
    if any(disks) or here != count or comment or start + size != end:
        raise ValueError("its directory is not where it ends")
    return start, size, count


def _entry(directory: bytes, place: int) -> tuple[Record, int]:
    """The entry at `place` of the directory, and where the next one is."""
    if place + _ENTRY.size > len(directory):
        raise ValueError("its directory is cut short")
    fields = _ENTRY.unpack_from(directory, place)
    mark, _, _, flags, method = fields[:5]
    checksum, stored, size, name_length, extra_length, comment, disk = fields[7:14]
    attributes, start = fields[15:17]
    name = directory[place + _ENTRY.size :][:name_length]
    extra = directory[place + _ENTRY.size + name_length :][:extra_length]
    if mark != b"PK\1\2" or len(name) + len(extra) != name_length + extra_length:
        raise ValueError("its directory is cut short")
    if attributes & 0xFFFF:  # of DOS: what it calls a folder, torch's reader does not read, and gives any memory for it
        raise ValueError(f"its record {name!r} is marked as no plain file")
    if method or stored != size or flags & ~_FLAGS or comment or disk:
        raise ValueError(f"its record {name!r} is compressed or encrypted, which torch.save never does")
    if _MAX32 in (size, start):
        wide = _wide_numbers(extra)
        size, stored = (wide.pop(0), wide.pop(0)) if size == _MAX32 else (size, size)
        start = wide.pop(0) if start == _MAX32 else start
        if size != stored:
            raise ValueError(f"its record {name!r} is compressed, which torch.save never does")
    return Record(name, start, size, checksum), place + _ENTRY.size + name_length + extra_length


def _wide_numbers(extra: bytes) -> list[int]:
    """The numbers of 8 bytes in the extra field of an entry."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            return list(struct.unpack(f"<{length // 8}Q", extra[4 : 4 + length]))
        extra = extra[4 + length :]
    raise ValueError("its directory lacks a number")
