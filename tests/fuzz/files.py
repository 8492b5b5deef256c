"""Mutants of data files: `..._cases(seed, number)` gives `number` of them, the same for the same seed."""

import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from backports import zstd

from tests.fuzz.configs import DEEP
from tests.fuzz.pickles import WIDE, byte_cases

ROWS = [
    {"text": "The cat sat."},
    {"text": "今天天气很好 😀", "n": 12.5},
    {"text": 'a\nb\\"', "more": [1, None, {"x": True}]},
    {"text": ""},
    {"text": "x" * 300, "n": -7},
]
OTHER_ROWS = [{"text": f"row {i} of another", "n": i} for i in range(40)]
NUMBERS = (
    b"1e400", b"-1e400", b"1e-400", b"-0", b"-0.0", b"00", b"01", b"1.", b".5", b"+1", b"0x10", b"1_000", b"NaN",
    b"Infinity", b"-Infinity", b"-", b"1e", b"9007199254740993", b"18446744073709551616", b"-9223372036854775809",
    b"9" * 30, b"9" * 400, b"9" * 5000, b"1." + b"1" * 5000, b"0." + b"0" * 400 + b"1", b"1E+2", b"12345678901234567.9",
)  # fmt: skip
TEXTS = (
    b"a", b"\\ud800", b"\\ud83d\\ude00", b"\xed\xa0\x80", b"\xff", b"\xe4\xbb", b"a\tb", b"\\x", b"\\u12", b"\xc0\x80",
    b"\xf4\x90\x80\x80", b"\xe2\x80\xa8", b"\x85", b"\x0c", b"a" * 200_000, b"\\" * 999, b"\xef\xbb\xbf",
)  # fmt: skip
LINES = (
    b"", b" ", b"\t", b"\r", b"\xef\xbb\xbf", b"\0", b"null", b"1", b'"x"', b"[]", b"{}", b"[1]", b"{", b"}", b"#",
    b"//", b'{"text": "a"} {"text": "b"}', b'{"text": "a"},', b'{"text": "a", "text": "b"}', b"{'text': 'a'}",
    b'{"text": "a",}', b'{"\xef\xbb\xbftext": "a"}', b"a" * 200_000, b"\0" * 5000,
    *(b'{"text": "' + each + b'"}' for each in TEXTS),
    *(each.encode() for each in DEEP), b'{"text": "a", "deep": ' + b"[" * 900 + b"]" * 900 + b"}",
)  # fmt: skip
ENDS = (b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"", b"\n\r", b" \n", b"\0\n", b"\xe2\x80\xa8", b"\x0b")


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """jsonl."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _odd_number(rng: random.Random) -> bytes:
    return b'{"text": "a", "n": ' + rng.choice(NUMBERS) + b"}"


def jsonl_cases(seed: int, count: int) -> Iterator[bytes]:
    """Lines that are rows, odd ones among them, odd ends of lines; or any bytes."""
    rng = random.Random(seed)
    for _ in range(count):
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.3).encode() for row in ROWS[: rng.randrange(6)]]
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            odd = _odd_number(rng) if rng.random() < 0.4 else rng.choice(LINES)
            lines.insert(rng.randrange(len(lines) + 1), odd)
        end = rng.choice(ENDS)
        text = b"".join(line + (rng.choice(ENDS) if rng.random() < 0.1 else end) for line in lines)
        yield _with_ends(rng, text)


def _with_ends(rng: random.Random, text: bytes) -> bytes:
    """`text` with a prefix, cut off, or with other bytes in it."""
    draw = rng.random()
    if draw < 0.25 and text:
        return next(byte_cases(rng.randrange(1 << 30), 1, text))
    if draw < 0.32:
        return b"\xef\xbb\xbf" + text
    if draw < 0.36:
        return text[: rng.randrange(len(text) + 1)]
    if draw < 0.4:
        return rng.choice(
            (text.decode("latin1").encode("utf-16"), text[:9000] * 300, b"\n" * 5000 + text, text + b"\0")
        )
    return text


def json_array_cases(seed: int, count: int) -> Iterator[bytes]:
    """One array of rows: odd elements, separators and space; or any bytes."""
    rng = random.Random(seed)
    space = (b"", b"", b" ", b"\n", b"\r\n  ", b"\t", b"\x0b", b"\0", b"/**/", b"\xef\xbb\xbf", b" " * 3000)
    for _ in range(count):
        elements = [json.dumps(row, indent=rng.choice((None, 2))).encode() for row in ROWS[: rng.randrange(6)]]
        if rng.random() < 0.5:
            odd = _odd_number(rng) if rng.random() < 0.5 else rng.choice(LINES)
            elements.insert(rng.randrange(len(elements) + 1), odd)
        comma = rng.choice(space) + rng.choice((b",",) * 9 + (b"", b",,", b";")) + rng.choice(space)
        opened = rng.choice((b"[",) * 12 + (b"[[", b"[,", b"{", b""))
        closed = rng.choice((b"]",) * 12 + (b"", b",]", b"]]", b"] []", b"]\n{}", b"}"))
        yield _with_ends(rng, rng.choice(space) + opened + comma.join(elements) + closed + rng.choice(space))


def gzip_cases(seed: int, count: int) -> Iterator[bytes]:
    """Members of two files' rows."""
    members = [gzip.compress(as_lines(rows), level, mtime=0) for rows in (ROWS, OTHER_ROWS) for level in (0, 9)]
    # A name, a comment and a field more in the header (RFC 1952, 2.3).
    members.append(members[1][:3] + b"\x1c" + members[1][4:10] + b"\2\0abname\0comment\0" + members[1][10:])

    def bombs() -> list[bytes]:  # made where one is drawn: they take a second
        return [
            gzip.compress(as_lines(ROWS[:1]) * 300_000, 1, mtime=0),
            gzip.compress(b'{"text": "' + b"a" * (48 << 20) + b'"}\n', 1, mtime=0),
        ]

    return _compressed(seed, count, members, [gzip.compress(b"", mtime=0), b"\0" * 40], bombs, 10)


def zst_cases(seed: int, count: int) -> Iterator[bytes]:
    """Frames of two files' rows, each with its checksum; and frames that are to be skipped (RFC 8878, 3.1)."""
    name = zstd.CompressionParameter
    options = [{name.checksum_flag: 1, name.compression_level: level} for level in (1, 19)]
    options.append({name.checksum_flag: 1, name.content_size_flag: 0, name.window_log: 27})
    frames = [zstd.compress(as_lines(rows), options=each) for rows in (ROWS, OTHER_ROWS) for each in options]
    skipped = [
        b"\x50\x2a\x4d\x18" + struct.pack("<I", size) + b"\0" * min(size, 9) for size in (0, 9, 10, (1 << 32) - 1)
    ]

    def bombs() -> list[bytes]:  # made where one is drawn: they take a second
        return [
            zstd.compress(as_lines(ROWS[:1]) * 300_000, options=options[0]),
            zstd.compress(b'{"text": "' + b"a" * (48 << 20) + b'"}\n', options=options[1]),
        ]

    return _compressed(seed, count, frames, [*skipped, zstd.compress(b"", options=options[0])], bombs, 12)


def _compressed(
    seed: int, count: int, frames: list[bytes], empty: list[bytes], bombs: Callable[[], list[bytes]], head: int
) -> Iterator[bytes]:
    """Frames one after another, cut, their bits turned (of `head`, their first bytes, more often), with more behind."""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.002:
            yield rng.choice(bombs())
            continue
        parts = [rng.choice(frames) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        if rng.random() < 0.2:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(empty))
        data = bytearray(b"".join(parts))
        for _ in range(rng.choice((0, 1, 1, 2))):
            _damage(rng, data, parts, head)
        yield bytes(data)


def _damage(rng: random.Random, data: bytearray, parts: list[bytes], head: int) -> None:
    begun = sum(map(len, parts[: rng.randrange(len(parts))]))
    at = rng.choice((begun + rng.randrange(head), rng.randrange(len(data) or 1), len(data) - rng.randrange(9)))
    if not 0 <= at < len(data):
        return
    change: list[Callable[[], Any]] = [
        lambda: data.__setitem__(at, data[at] ^ 1 << rng.randrange(8)),
        lambda: data.__setitem__(at, rng.randrange(256)),
        lambda: data.__delitem__(slice(at, None)),
        lambda: data.__delitem__(slice(at, at + rng.choice((1, 2, 8)))),
        lambda: data.extend(rng.choice((b"\0", b"\n", b"x", b"\0" * 512, b"{}\n", rng.randbytes(20), data[:at]))),
        lambda: data.__setitem__(slice(at, at), data[at : at + 40] * rng.choice((1, 9))),
    ]
    rng.choice(change)()


def index_cases(seed: int, count: int, index: bytes, data: bytes) -> Iterator[bytes]:
    """An index, after its length as u64, and the data: bytes and fields of the one, sizes of the other."""
    rng = random.Random(seed)
    n, m = struct.unpack_from("<QQ", index, 18)
    for _ in range(count):
        made, other = bytearray(index), data
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            _change_index(rng, made, n, m)
        draw = rng.random()
        if draw < 0.1:
            made = bytearray(next(byte_cases(rng.randrange(1 << 30), 1, bytes(made))))
        elif draw < 0.3:
            other = rng.choice((data[: rng.randrange(len(data))], data + data[: rng.randrange(9)], data * 2, b""))
        yield struct.pack("<Q", len(made)) + bytes(made) + other


def _change_index(rng: random.Random, made: bytearray, n: int, m: int) -> None:
    """Another number in the header or the arrays; another size."""
    at, size = rng.choice(((9, 8), (17, 1), (18, 8), (26, 8), (34, 4), (34 + 4 * n, 8), (34 + 12 * n, 8)))
    if at >= 34:
        at += size * rng.randrange(m if at == 34 + 12 * n else n)
    if len(made) < at + size or rng.random() < 0.1:
        del made[rng.randrange(len(made) + 1) :]
        return
    old = int.from_bytes(made[at : at + size], "little")
    new = rng.choice((old + 1, old - 1, old * 2, old ^ 1 << rng.randrange(8 * size), rng.choice(WIDE), n, m))
    made[at : at + size] = (new & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if rng.random() < 0.1:
        made.extend(b"\0" * rng.choice((1, 4, 8, 12)))


def safetensors_cases(seed: int, count: int, source: bytes, index: dict[str, Any]) -> Iterator[bytes]:
    """A file of safetensors: its header's length, fields and bytes, its tensors' bytes; or `index`, as JSON."""
    rng = random.Random(seed)
    (length,) = struct.unpack_from("<Q", source)
    header, data = json.loads(source[8 : 8 + length]), source[8 + length :]
    plain = byte_cases(seed, count, source)
    for _ in range(count):
        text, draw, header_size, after = next(plain), rng.random(), 0, data
        if draw < 0.1:
            yield text
            continue
        if draw < 0.3:
            yield _index_case(rng, index)
            continue
        made = json.loads(json.dumps(header))
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            _change_header(rng, made, len(data))
        text = json.dumps(made).encode()
        if rng.random() < 0.1:
            text = rng.choice((text + b" " * 9, text + b"\0", b" " + text, b'{"norm.weight":{},' + text[1:], text[:-1]))
        header_size = len(text) if rng.random() < 0.9 else rng.choice((len(text) + 1, len(text) - 1, *WIDE))
        if rng.random() < 0.1:
            after = rng.choice((data[: rng.randrange(len(data))], data + b"\0", data * 2, b""))
        yield struct.pack("<Q", header_size) + text + after


def _change_header(rng: random.Random, made: dict[str, Any], size: int) -> None:
    name = rng.choice(sorted(made))
    odd: tuple[Any, ...] = (None, -1, 0, 1, 2.5, "8", [], {}, [8, 8], True, 1 << 40, (1 << 64) - 1, 1 << 64, "x" * 3000)
    if rng.random() < 0.2 or not isinstance(made[name], dict):
        moved = made.pop(name)
        if rng.random() < 0.7:
            made[rng.choice(("x", "", name + "x", "__metadata__", "model.norm.weight", "../x", "\0", "\u0301"))] = moved
        return
    field = rng.choice(("dtype", "shape", "data_offsets", "data_offsets", "more"))
    if field == "dtype":
        made[name][field] = rng.choice(("BF16", "F16", "F64", "I8", "U8", "BOOL", "F8_E4M3", "I32", "f32", "", *odd))
    elif field in made[name] and isinstance(made[name][field], list) and made[name][field] and rng.random() < 0.8:
        values, at = made[name][field], rng.randrange(len(made[name][field]))
        old = values[at] if isinstance(values[at], int) else 0
        values[at] = rng.choice((old + 1, old - 1, old + 4, old * 2, 0, size, size + 4, *odd))
        if rng.random() < 0.2:
            values.append(rng.choice((0, 1, 2)))
    else:
        made[name][field] = rng.choice(odd)


def _index_case(rng: random.Random, index: dict[str, Any]) -> bytes:
    made = json.loads(json.dumps(index))
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2, 3)]
    files += ["../x.safetensors", "", ".", "/etc/passwd", "config.json", None, 1, [], "\0", "\ud800", "a" * 5000]
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(sorted(made["weight_map"]))
        if rng.random() < 0.3:
            made["weight_map"].pop(name)
        made["weight_map"][rng.choice((name, name, name, "x", ""))] = rng.choice(files)
    text = json.dumps(made).encode()
    if rng.random() < 0.3:
        text = next(byte_cases(rng.randrange(1 << 30), 1, text))
    return text.replace(b"{", b"{ ", 1)
