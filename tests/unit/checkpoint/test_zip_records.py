"""Zips that another reader would read differently are refused; those of torch.save are read as they are."""

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from common.checkpoint.untrusted.zip_records import read_data_start, read_records
from tests.unit.checkpoint.opcodes import archive

SOUND = archive(b"K\x05", **{"data/0": b"12345678"})
PICKLE = zipfile.ZipFile(io.BytesIO(SOUND)).read("archive/data.pkl")


def read(data: bytes) -> dict[str, bytes]:
    def part(start: int, size: int) -> bytes:
        return data[start : start + size]

    found = read_records(part, len(data)).items()
    return {name: part(read_data_start(part, record), record.size) for name, record in found}


def zipped(*records: tuple[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as file:
        for name, data in records:
            file.writestr(name, data)
    return stream.getvalue()


@pytest.mark.parametrize("count", [0, 3, 200])
def test_the_records_are_those_of_zipfile(count: int, tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"tensors": [torch.randn(i + 1) for i in range(count)]}, path)
    with zipfile.ZipFile(path) as file:
        expected = {info.filename.partition("/")[2]: file.read(info) for info in file.infolist()}
    assert read(path.read_bytes()) == expected and len(expected) >= count + 3


def test_a_zip_written_by_python_is_read() -> None:
    assert read(SOUND) == {"data.pkl": PICKLE, "version": b"3\n", "data/0": b"12345678"}


def moved(data: bytes, at: int, kind: str, change: int) -> bytes:
    """`data` with the number at `at` from its end changed."""
    at += len(data)
    (value,) = struct.unpack_from(kind, data, at)
    return data[:at] + struct.pack(kind, value + change) + data[at + struct.calcsize(kind) :]


END = zipped(("archive/data.pkl", PICKLE))
ODD = {
    "nothing": b"",
    "no zip": PICKLE * 9,
    "a pickle before it": PICKLE + SOUND,
    "bytes behind it": SOUND + b"\0",
    "a comment": moved(SOUND, -2, "<H", 1) + b"c",
    "another zip behind it": SOUND + END,
    "a gap before the directory": moved(SOUND, -6, "<I", -1),
    "fewer records than it says": moved(moved(SOUND, -12, "<H", 1), -14, "<H", 1),
    "of another disk": moved(SOUND, -18, "<H", 1),
    "compressed": zipped(("archive/data.pkl", PICKLE * 9), kind=zipfile.ZIP_DEFLATED),
    "no pickle": zipped(("archive/version", b"3\n")),
    "the pickle twice": zipped(("archive/data.pkl", PICKLE), ("archive/data.pkl", PICKLE)),
    "the pickle in another case": zipped(("archive/data.pkl", PICKLE), ("archive/DATA.pkl", PICKLE)),
    "in two folders": zipped(("other/version", b"3\n"), ("archive/data.pkl", PICKLE)),
    "in no folder": zipped(("data.pkl", PICKLE)),
    "TorchScript": zipped(("archive/data.pkl", PICKLE), ("archive/constants.pkl", PICKLE)),
    "code": zipped(("archive/data.pkl", PICKLE), ("archive/code/a.py", b"")),
    "a folder above": zipped(("archive/data.pkl", PICKLE), ("archive/data/../../a", b"")),
    "a header of another record": SOUND.replace(b"archive/version", b"archive/byteord", 1),
    "an encrypted record": SOUND.replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0", 1),
    "a record larger than the file": SOUND.replace(struct.pack("<II", 8, 8), struct.pack("<II", 1 << 20, 1 << 20)),
    "a record that is a folder": SOUND.replace(struct.pack("<I", 0o600 << 16), struct.pack("<I", 0o600 << 16 | 16), 1),
    "another record in its header": SOUND.replace(b"archive/data.pkl", b"archive/data.pkX", 1),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_zip_that_torch_does_not_write_is_refused(kind: str) -> None:
    assert ODD[kind] != SOUND
    with pytest.raises(ValueError, match="^it|^the header"):
        read(ODD[kind])


def test_each_missing_byte_is_noticed() -> None:
    for length in range(len(SOUND)):
        with pytest.raises(ValueError, match="^it"):
            read(SOUND[:length])


def test_two_ends_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    assert data[-42:-38] == b"PK\6\7"  # torch writes the end for large files too
    for at, kind in ((-6, "<I"), (-12, "<H"), (-34, "<Q"), (-50, "<Q"), (-58, "<Q"), (-66, "<Q")):
        with pytest.raises(ValueError, match="^its"):
            read(moved(data, at, kind, 1))
