"""A known name is called, and its objects changed, only as the pickler does it; anything else is refused."""

import collections
import io
import pickle
import struct
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from common.checkpoint.formats.torch_archive import ArchiveFile
from common.checkpoint.untrusted.restricted_unpickler import RestrictedUnpickler
from common.errors import KitError
from tests.unit.checkpoint.opcodes import archive, call, entry, named, number, pickled, several, word

FILE = Path("folder/common.pt")
NO, YES, NONE, EMPTY = b"\x89", b"\x88", b"N", b")"
BIG = 2 << 30
ARRAY = call(named("numpy.core.multiarray", "_reconstruct"), named("numpy", "ndarray"), b"K\0\x85", b"C\x01b")
STORAGE = several(word("storage"), named("torch", "FloatStorage"), word("0"), word("cpu"), b"K\x02") + b"Q"  # 2 numbers
HOOKS = named("collections", "OrderedDict") + EMPTY + b"R"


def load(value: bytes) -> Any:
    return RestrictedUnpickler(pickled(value), FILE).load()


def dtype(code: str, copy: bytes = YES) -> bytes:
    return call(named("numpy", "dtype"), word(code), NO, copy)


def state(order: str = "<", names: bytes = NONE, fields: bytes = NONE, size: int = -1, flags: int = 0) -> bytes:
    numbers = number(size) + number(-1) + number(flags)
    return several(b"K\x03", word(order), NONE, names, fields, numbers) + b"b"


def array(kind: bytes, size: int, data: bytes) -> bytes:
    return ARRAY + several(b"K\x01", number(size) + b"\x85", kind, NO, b"C" + bytes([len(data)]) + data) + b"b"


def tensor(offset: int = 0, size: int = 2, stride: int = 1, hooks: bytes = HOOKS, storage: bytes = STORAGE) -> bytes:
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage, number(offset), number(size) + b"\x85", number(stride) + b"\x85", NO, hooks)


LONG = b"\x8b" + struct.pack("<i", 3 << 20) + b"\x7f" * (3 << 20)  # a number of 3 MiB
OBJECT = entry(word("f0"), dtype("O") + b"K\0\x86")
FIELD = entry(word("f0"), dtype("f4") + b"K\0\x86")
INDEX = named("torch.distributed.checkpoint.metadata", "MetadataIndex")

# What it is, its pickle, and what the message names.
HOSTILE = {
    "numpy: an object": (dtype("O"), r"calls numpy\.dtype"),
    "numpy: plain bytes": (dtype("V8"), r"calls numpy\.dtype"),
    "numpy: a field": (dtype("u8") + state(names=word("f0") + b"\x85", fields=FIELD), "sets a state of .*NumpyDtype"),
    "numpy: another size": (dtype("u8") + state(size=1 << 40), "sets a state of .*NumpyDtype"),
    "numpy: flags of objects": (dtype("u8") + state(flags=63), "sets a state of .*NumpyDtype"),
    "numpy: its own dtype": (dtype("u4", copy=NO), r"calls numpy\.dtype"),
    "numpy: ndarray": (call(named("numpy", "ndarray"), b"K\x01\x85", dtype("u8")), r"calls numpy\.ndarray"),
    "numpy: too few bytes": (array(dtype("u4"), 100, b"1234"), r"sets a state of numpy\.ndarray"),
    "numpy: no dtype": (array(word("O"), 1, b"12345678"), r"sets a state of numpy\.ndarray"),
    "an attribute of a class": (INDEX + NONE + entry(word("evil"), NONE) + b"\x86b", "sets the state of .*Index"),
    "an attribute by slots": (INDEX + EMPTY + b"\x81" + NONE + entry(word("a"), NONE) + b"\x86b", "sets a state of .*"),
    "a class of its own": (
        named("argparse", "Namespace") + EMPTY + b"\x81" + entry(word("__class__"), named("builtins", "list")) + b"b",
        r"sets a state of argparse\.Namespace",
    ),
    "a field of an index": (INDEX + EMPTY + b"\x81" + entry(word("fqn"), b"]") + b"b", "sets a state of .*Index"),
    "memory: bytearray": (call(named("builtins", "bytearray"), number(BIG)), r"calls builtins\.bytearray"),
    "memory: bytes": (call(named("builtins", "bytes"), number(BIG)), r"calls builtins\.bytes"),
    "memory: list": (call(named("builtins", "list"), call(named("builtins", "range"), number(BIG))), r"builtins\.list"),
    "memory: set": (call(named("builtins", "set"), call(named("builtins", "range"), number(BIG))), r"builtins\.set"),
    "memory: str": (call(named("builtins", "str"), number(BIG)), r"calls builtins\.str"),
    "memory: Size": (call(named("torch", "Size"), call(named("builtins", "range"), number(BIG))), r"calls torch\.Size"),
    "memory: storage": (call(named("torch.storage", "UntypedStorage"), number(BIG)), r"calls torch\.storage\.Untyped"),
    "memory: the memo": (NONE + b"r\xff\xff\xff\x7f", "memoizes an object at index 2147483647 of 0"),
    "memory: copies": (
        b"](" + b"B\x10\x27\0\0" + bytes(10_000) + b"\x94" + (named("builtins", "bytearray") + b"h\0\x85R") * 99 + b"e",
        "copies its content too often",
    ),
    "memory: sets": (b"](" + b"\x8f" * 100_000 + b"e", "creates too many sets or classes"),
    "memory: frozensets": (b"](" + b"(\x91" * 100_000 + b"e", "creates too many sets or classes"),
    "time: a long number as a key": (b"}" + LONG + b"\x94" + b"Ns" + b"h\0Ns" * 10_000, "has int as a key"),
    "time: a long number in a range": (call(named("builtins", "range"), NONE, LONG, b"K\3"), r"calls builtins\.range"),
    "time: a long number of bytes": (call(named("builtins", "bytes"), LONG), r"calls builtins\.bytes"),
    "time: a long format": (
        call(named("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"), LONG), r"calls torch\.distributed",
    ),
    "time: tuples in a key": (b"}" + b"((" + b"N" * 60 + b"t\x94" + b"h\0" * 60 + b"tNs", "has tuple as a key"),
    "time: one key": (b"}(" + b"K\1\x85N" * 1002 + b"u", "has too many keys with equal hashes"),
    "time: one element": (b"\x8f(" + b"K\1" * 1002 + b"\x90", "has too many keys with equal hashes"),
    "time: attributes of many dicts": (
        call(named("torch._tensor", "_rebuild_from_type_v2"), NONE, NONE, NONE, b"(" + b"}" * 100 + b"t"),
        r"calls torch\._tensor\._rebuild_from_type_v2",
    ),
    "what a terminal obeys": (named("a\x1b[2J\n" + "b" * 500, "c"), r"references a\\x1b\[2J\\nb{200,300}\.\.\., which"),
    "a stack of tuples as a key": (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "has tuple as a key"),
    "a set of lists": (b"\x8f(]\x90", "adds unhashable or unknown items to set"),
    "an enum of its own": (
        call(named("signal", "Signals"), word("Mine"), word("A B")), r"calls signal\.Signals with arguments that",
    ),
    "entries of no dict": (b"]NNs", "sets entries of list"),
    "appends to no list": (HOOKS + b"Na", "appends to OrderedDict"),
    "INST": (b"(ibuiltins\neval\n", "uses the pickle opcode INST"),
    "OBJ": (b"(" + named("builtins", "list") + b"o", "uses the pickle opcode OBJ"),
    "EXT1": (b"\x82\x01", "uses the pickle opcode EXT1"),
    "PERSID": (b"Pa\n", "uses the pickle opcode PERSID"),
    "BYTEARRAY8": (b"\x96" + b"\0" * 5 + b"\1\0\0", "uses the pickle opcode BYTEARRAY8"),
    "NEXT_BUFFER": (b"\x97", "uses the pickle opcode NEXT_BUFFER"),
    "a frame in a frame": (b"\x95\x0b\0\0\0\0\0\0\0N" + b"\x95\1\0\0\0\0\0\0\0N", "has nested frames"),
    "a storage in no archive": (tensor(), "references a storage outside an archive"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_the_pickler_does_not_write_is_refused(kind: str) -> None:
    value, message = HOSTILE[kind]
    start = time.monotonic()
    with pytest.raises(KitError, match=rf"^folder/common\.pt .*({message})"):
        load(value)
    assert time.monotonic() - start < 5 and not hasattr(dcp.MetadataIndex, "evil")


IN_ARCHIVES = {
    "a storage larger than its record": (tensor(), {"data/0": bytes(7)}, "record data/0 is missing or too short"),
    "a storage without a record": (tensor(), {}, "record data/0 is missing or too short"),
    "a storage of the kind of a function": (
        tensor(storage=STORAGE.replace(word("FloatStorage"), word("float32"))), {"data/0": bytes(8)}, "persistent id",
    ),
    "a place of another kind": (
        tensor(storage=STORAGE.replace(word("cpu"), word("os"))), {"data/0": bytes(8)}, "has a persistent id",
    ),
    "elements behind the storage": (tensor(offset=1), {"data/0": bytes(8)}, "calls torch._utils._rebuild_tensor_v2"),
    "elements before the storage": (tensor(offset=-1), {"data/0": bytes(8)}, "calls torch._utils._rebuild_tensor_v2"),
    "one element many times": (
        tensor(size=1 << 40, stride=0), {"data/0": bytes(8)}, "calls torch._utils._rebuild_tensor_v2",
    ),
    "hooks": (
        tensor(hooks=entry(b"K\0", named("builtins", "list"))), {"data/0": bytes(8)}, "calls torch._utils._rebuild",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_ARCHIVES)
def test_tensors_that_torch_does_not_write_are_refused(kind: str, tmp_path: Path) -> None:
    value, records, message = IN_ARCHIVES[kind]
    (tmp_path / "a.pt").write_bytes(archive(value, **records))
    with pytest.raises(KitError, match=rf"a\.pt .*{message}"):
        ArchiveFile(tmp_path / "a.pt").read()


def test_the_same_tensor_is_read_where_it_is_valid(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(archive(tensor(), **{"data/0": bytes(8)}))
    assert torch.equal(ArchiveFile(tmp_path / "a.pt").read(), torch.zeros(2))
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=False), torch.zeros(2))


def test_what_is_refused_would_have_done_harm() -> None:
    """By the C unpickler, in a separate process: it crashes at an address that the file sets."""
    kind = dtype("V8") + state(order="|", names=word("f0") + b"\x85", fields=OBJECT, size=8)
    address = call(named("builtins", "bytearray"), b"(" + b"KA" * 8 + b"t")
    crash = call(named("numpy", "ndarray"), b"K\x01\x85", kind, address)
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()))"
    done = subprocess.run([sys.executable, "-c", code], input=pickled(crash), capture_output=True, check=False)
    assert done.returncode < 0
    with pytest.raises(KitError, match=r"calls numpy\.dtype with arguments that the pickler does not write"):
        load(crash)


def test_a_frame_that_ends_within_a_name_makes_the_c_unpickler_read_another() -> None:
    data = b"\x80\x04\x95\x02\0\0\0\0\0\0\0" + b"cxos\nsystem\n."
    with pytest.raises(KitError, match=r"references xos\.system"):
        RestrictedUnpickler(data, FILE).load()
    assert pickle.Unpickler(io.BytesIO(data)).load().__name__ == "system"  # of os: the x is lost
    harmless = data.replace(b"xos\nsystem", b"torch\nfloat32")
    with pytest.raises(KitError, match="has a frame that ends within an opcode"):
        RestrictedUnpickler(harmless, FILE).load()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_checkpoints_hold_is_read(protocol: int) -> None:
    rows = [Namespace(index=i, name=f"row {i}", at=(i, 2.5, None, True, b"\xff", 1 << 70)) for i in range(3000)]
    values = {
        "rows": rows,  # more than one frame
        "set": {1, "a", (2, 3)},
        "numbers": [slice(1, None, 2), range(3), complex(1, 2), bytearray(b"ab")],
        "ordered": collections.OrderedDict(a=1),
        (torch.float32, torch.bfloat16): numpy.random.get_state(),
    }
    values["ordered"]._metadata = {"": {"version": 1}}
    data = pickle.dumps(values, protocol)
    assert len(data) > 1 << 16
    found = RestrictedUnpickler(data, FILE).load()
    state, expected = (dict(one).pop((torch.float32, torch.bfloat16)) for one in (found, values))
    assert (state[1] == expected[1]).all() and state[2:] == expected[2:]
    assert all(found[name] == values[name] for name in ("rows", "set", "numbers", "ordered"))
    assert found["ordered"]._metadata == {"": {"version": 1}}
