"""Mutants of pickles and archives: of what passes here, torch reads the same bytes, and looks up the same names."""

import io
import pickle
import random
import struct
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint import metadata as dcp

from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.restricted_unpickler import RestrictedUnpickler
from common.errors import KitError
from tests.unit.checkpoint.opcodes import archive, named

FILE = Path("folder/common.pt")
TENSORS = dcp.TensorStorageMetadata(dcp.TensorProperties(), torch.Size([4]), [])
VALUES: list[Any] = [
    dcp.Metadata({"a": TENSORS, "b": dcp.BytesStorageMetadata()}, None, {dcp.MetadataIndex("a", torch.Size([0])): 1}),
    {"args": Namespace(a=1, b=[2.5, None], c={1, 2}, d=frozenset([3])), "rng": numpy.random.get_state()[2:]},
    [numpy.float64(3), numpy.arange(3), slice(1, 2), range(4), complex(1, 2), bytearray(b"ab"), torch.float32],
]
INSERTED = [
    *(bytes([code]) for code in b"Rb\x81(t\x85\x86)}]Nsuae021.Q\x88\x89\x8f\x90\x91\x94"),
    *(named(*name) for name in (("builtins", "list"), ("numpy", "dtype"), ("numpy", "ndarray"), ("posix", "system"))),
    b"cbuiltins\nbytearray\n", b"h\x01", b"j\x01\1\0\0", b"q\x07", b"r\xff\xff\xff\x7f", b"K\x05",
    *(b"\x95" + struct.pack("<Q", size) for size in (0, 2, 5, 9, 30)),
]  # fmt: skip


class Dummy:
    """Accepts any operation on it."""

    def __init__(self, *_: Any) -> None: ...

    def __new__(cls, *_: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


class Ours(RestrictedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        self.__dict__.setdefault("names", []).append((module, name))
        return super().find_class(module, name)


class Theirs(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        self.__dict__.setdefault("names", []).append((module, name))
        return type(name, (Dummy,), {})


def passes(load: Callable[[], Any]) -> bool:
    try:
        load()
    except Exception:  # damaged, refused, or whatever pickle raises
        return False
    return True


def test_the_c_unpickler_looks_up_the_same_names_in_accepted_pickles() -> None:
    rng, seeds = random.Random(1), [pickle.dumps(value, protocol) for value in VALUES for protocol in (2, 4)]
    assert all(passes(RestrictedUnpickler(seed, FILE).load) for seed in seeds)
    passed = 0
    for _ in range(6000):
        data = bytearray(rng.choice(seeds))
        at = rng.randrange(2, len(data))
        if rng.random() < 0.4:
            data[at] = rng.randrange(256)
        else:
            data[at:at] = b"".join(rng.choices(INSERTED, k=rng.choice((1, 1, 2, 3))))
        ours, theirs = Ours(bytes(data), FILE), Theirs(io.BytesIO(data), encoding="utf-8")
        if passes(ours.load):
            passed += 1
            completed = passes(theirs.load)
            found, expected = (vars(one).get("names", []) for one in (ours, theirs))
            assert expected == found if completed else expected == found[: len(expected)], bytes(data)
    assert passed > 300


def test_torchs_reader_finds_the_same_bytes_in_an_archive_that_passes(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(5), "b": [1, 2]}, tmp_path / "a.pt")
    rng, seeds = random.Random(1), [(tmp_path / "a.pt").read_bytes(), archive(b"K\x05", **{"data/0": b"12345678"})]
    passed = 0
    for _ in range(6000):
        data = bytearray(rng.choice(seeds))
        marks = [place for place in range(len(data) - 1) if data[place : place + 2] == b"PK"]
        for _ in range(rng.choice((1, 1, 2))):
            data[min(rng.choice(marks) + rng.randrange(60), len(data) - 1)] = rng.choice((0, 1, 8, 16, 255))
        try:
            reader = ArchiveReader(lambda start, size, data=data: bytes(data[start : start + size]), len(data), FILE)
            ours = {name: reader.data(name) for name in reader.records}
        except (KitError, ValueError):
            continue
        passed += 1
        try:
            theirs = torch._C.PyTorchFileReader(io.BytesIO(data))
            found = {name: theirs.get_record(name) for name in theirs.get_all_records()}
        except (RuntimeError, UnicodeDecodeError):
            continue  # it reads none of it
        assert found == ours, bytes(data)
    assert passed > 300
