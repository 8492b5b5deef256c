"""The records of a torch.save zip, read so that torch's reader cannot find others.

zipfile and torch's reader (miniz) differ on malformed zips: bytes before the first record, duplicate names, two end
records. One of them may find another pickle than the other. So only the layout that torch writes is accepted, which
neither library checks: uncompressed records, then the central directory, then its end record.
Source of the layout: caffe2/serialize/inline_container.cc, third_party/miniz-*/miniz.c.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_END = struct.Struct("<4s4H2IH")  # PK\5\6, disks, entries twice, size and start of the directory, comment
_LOCATOR = struct.Struct("<4sIQI")  # PK\6\7, disk, offset of the zip64 end, number of disks
_ZIP64_END = struct.Struct("<4sQ2H2I4Q")  # PK\6\6, its size, versions, disks, entries twice, size and start
_ENTRY = struct.Struct("<4s6H3I5H2I")
_HEADER = struct.Struct("<4s5H3I2H")
_FLAGS = 0x808  # sizes and checksum after the data, UTF-8 name
_NAME = re.compile(r"([^/\0]+)/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|"
                   r"\.data/serialization_id|data/[\w.-]+)")  # fmt: skip
_TAIL_BYTES = 4096  # enough for the directory of a few tensors

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes


@dataclass(frozen=True)
class Record:
    """A record: the offset of its header, and the size and CRC-32 of its data."""

    name: bytes
    start: int
    size: int
    checksum: int


def read_records(read: Read, length: int) -> dict[str, Record]:
    """The records of a zip of `length` bytes by their names inside its top folder: data.pkl, data/0, ...

    Raises ValueError where it is not a zip, or one that torch.save would not write.
    """
    tail_start = max(length - _TAIL_BYTES, 0)
    tail = read(tail_start, length - tail_start)
    start, size, count = _directory(tail, length)
    directory = tail[start - tail_start :][:size] if start >= tail_start else read(start, size)
    if read(0, 4) != b"PK\3\4" or len(directory) != size:
        raise ValueError("it is not a zip")
    records: dict[str, Record] = {}
    folders, place = set(), 0
    while place < size:
        record, place = _entry(directory, place)
        found = _NAME.fullmatch(record.name.decode("ascii"))
        if found is None or found[2].lower() in records:
            raise ValueError(f"its record {record.name!r} is a duplicate, or one that torch.save does not write")
        records[found[2].lower()] = record
        folders.add(found[1])
    if len(folders) != 1 or len(records) != count or "data.pkl" not in records:
        raise ValueError("its directory is not that of one data.pkl and its records")
    if sum(record.size for record in records.values()) > start or any(r.start >= start for r in records.values()):
        raise ValueError("its records are larger than it is")
    return {record.name.decode().partition("/")[2]: record for record in records.values()}


def read_data_start(read: Read, record: Record) -> int:
    """The offset of the data of `record`; raises ValueError where its header does not match the directory."""
    header = read(record.start, _HEADER.size + len(record.name))
    if len(header) == _HEADER.size + len(record.name):
        mark, _, flags, method, *_, name_length, extra_length = _HEADER.unpack_from(header)
        same = header[_HEADER.size :] == record.name and name_length == len(record.name)
        if mark == b"PK\3\4" and same and not (method or flags & ~_FLAGS):
            return record.start + len(header) + extra_length
    raise ValueError(f"the header of its record {record.name!r} does not match its directory")


def _directory(tail: bytes, length: int) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory of a zip that ends in `tail`."""
    if len(tail) < _END.size:
        raise ValueError("it is not a zip")
    mark, *disks, here, count, size, start, comment = _END.unpack(tail[-_END.size :])
    if mark != b"PK\5\6":
        raise ValueError("it has no end record")
    before, end = tail[: -_END.size], length - _END.size
    if before[-_LOCATOR.size :][:4] == b"PK\6\7":
        shown = (here, count, size, start)
        end -= _LOCATOR.size + _ZIP64_END.size
        mark, own, _, _, *zip64_disks, here, count, size, start = _ZIP64_END.unpack(
            before[-_LOCATOR.size - _ZIP64_END.size : -_LOCATOR.size]
        )
        place = _LOCATOR.unpack(before[-_LOCATOR.size :])[1:]
        truncated = (min(here, _MAX16), min(count, _MAX16), min(size, _MAX32), min(start, _MAX32))
        if (mark, own, place, truncated) != (b"PK\6\6", _ZIP64_END.size - 12, (0, end, 1), shown):
            raise ValueError("its two end records contradict each other")
        disks += zip64_disks
    if any(disks) or here != count or comment or start + size != end:
        raise ValueError("its directory is not at its end")
    return start, size, count


def _entry(directory: bytes, place: int) -> tuple[Record, int]:
    """The entry at offset `place` of the directory, and the offset of the next one."""
    if place + _ENTRY.size > len(directory):
        raise ValueError("its directory is truncated")
    fields = _ENTRY.unpack_from(directory, place)
    mark, _, _, flags, method = fields[:5]
    checksum, stored, size, name_length, extra_length, comment, disk = fields[7:14]
    attributes, start = fields[15:17]
    name = directory[place + _ENTRY.size :][:name_length]
    extra = directory[place + _ENTRY.size + name_length :][:extra_length]
    if mark != b"PK\1\2" or len(name) + len(extra) != name_length + extra_length:
        raise ValueError("its directory is truncated")
    if attributes & 0xFFFF:  # of DOS: for a folder, torch's reader returns uninitialized memory
        raise ValueError(f"its record {name!r} is not marked as a plain file")
    if method or stored != size or flags & ~_FLAGS or comment or disk:
        raise ValueError(f"its record {name!r} is compressed or encrypted, which torch.save never does")
    if _MAX32 in (size, start):
        large = _zip64_numbers(extra)
        size, stored = (large.pop(0), large.pop(0)) if size == _MAX32 else (size, size)
        start = large.pop(0) if start == _MAX32 else start
        if size != stored:
            raise ValueError(f"its record {name!r} is compressed, which torch.save never does")
    return Record(name, start, size, checksum), place + _ENTRY.size + name_length + extra_length


def _zip64_numbers(extra: bytes) -> list[int]:
    """The 8-byte numbers in the zip64 extra field of an entry."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            return list(struct.unpack(f"<{length // 8}Q", extra[4 : 4 + length]))
        extra = extra[4 + length :]
    raise ValueError("its directory lacks a zip64 number")
