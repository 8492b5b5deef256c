"""Mutants of pickles, of torch's archives with them, and of any bytes.

Each `..._cases(seed, number, source)` gives `number` mutants of `source`, the same for the same seed.
"""

import io
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Iterator

from tests.unit.checkpoint.opcodes import named, number, word

INSERTED = [
    *(bytes([code]) for code in b"Rb\x81(t\x85\x86\x87)}]Nsuae021.Q\x88\x89\x8f\x90\x91\x94"),
    *(named(*name) for name in (
        ("builtins", "list"), ("builtins", "bytearray"), ("builtins", "range"), ("builtins", "set"),
        ("builtins", "eval"), ("posix", "system"), ("numpy", "dtype"), ("numpy", "ndarray"), ("torch", "Size"),
        ("torch", "bfloat16"), ("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"),
        ("argparse", "Namespace"), ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("megatron.core.enums", "ModelType"), ("megatron.of.tomorrow", "Kind"), ("io", "BytesIO"),
    )),
    *(number(value) for value in (-1, 0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))),
    *(word(text) for text in ("", "model", "_extra_state", "__class__", "../../x", "\x1b[2J", "a" * 300)),
    b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000, b"G\x7f\xf8\0\0\0\0\0\0", b"C\x03abc",
    b"cbuiltins\nbytearray\n", b"h\x00", b"h\x01", b"h\x05", b"j\x01\1\0\0", b"q\x07", b"r\xff\xff\xff\x7f", b"K\x05",
    b"\x85" * 2000, b"h\x01\x86" * 99,
    *(b"\x95" + struct.pack("<Q", size) for size in (0, 2, 5, 9, 30, 1 << 40)),
]  # fmt: skip
WIDE = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF]


def byte_cases(seed: int, count: int, source: bytes) -> Iterator[bytes]:
    """Bytes changed, left out, repeated, inserted, cut off, swapped with others."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(source)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _change_bytes(rng, data)
        yield bytes(data)


def _change_bytes(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(at + rng.choice((1, 1, 2, 4, 8, 50)), len(data))
    kind = rng.randrange(7)
    if kind == 0:
        data[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
    elif kind == 1 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = data[at:end] * rng.choice((1, 2, 100))
    elif kind == 4:
        data[at:at] = rng.choice(INSERTED)
    elif kind == 5 and len(data) > at:
        size = rng.choice((1, 2, 4, 8))
        data[at : at + size] = (rng.choice(WIDE) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    elif rng.random() < 0.2:
        del data[at:]


def cases(seed: int, count: int, source: bytes) -> Iterator[bytes]:
    """Of a pickle: opcodes left out, repeated, moved, inserted, given other arguments; or bytes, as above."""
    rng, opcodes = random.Random(seed), opcodes_of(source)
    plain = byte_cases(seed, count, source)
    for _ in range(count):
        changed = next(plain)
        if rng.random() < 0.75:
            parts = list(opcodes)
            for _ in range(rng.choice((1, 1, 2, 3, 6))):
                _change_opcodes(rng, parts)
            changed = b"".join(parts)
        yield changed


def _change_opcodes(rng: random.Random, parts: list[bytes]) -> None:
    at, other = rng.randrange(1, len(parts) + 1), rng.randrange(len(parts))
    end = at + rng.choice((1, 1, 2, 5))
    change: list[Callable[[], None]] = [
        lambda: parts.insert(at, rng.choice(INSERTED)),
        lambda: parts.__setitem__(slice(at, end), [rng.choice(INSERTED)]),
        lambda: parts.__delitem__(slice(at, end)),
        lambda: parts.__setitem__(slice(at, at), parts[at:end] * rng.choice((1, 3, 200))),
        lambda: parts.__setitem__(slice(at, at + 1), [parts[other]]),
        lambda: parts.insert(at, parts[other]),
    ]
    rng.choice(change)()


def opcodes_of(source: bytes) -> list[bytes]:
    """A valid pickle, opcode by opcode, each with its argument; frames are left out."""
    found = [(opcode.name, place or 0) for opcode, _, place in pickletools.genops(source)]
    ends = [place for _, place in found[1:]] + [len(source)]
    return [source[place:end] for (name, place), end in zip(found, ends, strict=True) if name != "FRAME"]


def archive_cases(seed: int, count: int, source: bytes) -> Iterator[bytes]:
    """Of a file of torch.save: its pickle as above, in a valid zip; its zip's own fields; or any of its bytes."""
    rng = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(source)) as file:
        records = {name: file.read(name) for name in file.namelist()}
    (pickled,) = (name for name in records if name.endswith("/data.pkl"))
    inner, outer = cases(seed, count, records[pickled]), byte_cases(seed, count, source)
    marks = [place for place in range(len(source) - 1) if source[place : place + 2] == b"PK"]
    for _ in range(count):
        within, plain = next(inner), next(outer)
        draw = rng.random()
        if draw < 0.7:
            yield _zipped({**records, pickled: within})
        elif draw < 0.85:
            data = bytearray(source)
            for _ in range(rng.choice((1, 1, 2))):
                place = min(rng.choice(marks) + rng.randrange(60), len(data) - 1)
                data[place] = rng.choice((0, 1, 8, 16, 127, 255))
            yield bytes(data)
        else:
            yield plain


def _zipped(records: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in records.items():
            file.writestr(name, data)
    return stream.getvalue()
