"""Mutants of JSON files: `cases(seed, number, source)` gives `number` texts, the same for the same seed."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from tests.fuzz.pickles import byte_cases

NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 7, 63, 64, 65, 10_000, 10_001, 1 << 31, 1 << 63, 1 << 64, 10**12, 10**300, 10**400, -(1 << 63),
    0.0, -0.0, 0.5, 1.0, 2.0, 1e-300, 1e300, 1e308, float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, False, "", "2", "true", "false", "auto", "default", "yarn", "nan", "\ud800", "\x1b[2J", "\0",
    "a" * 5000, "../../etc/passwd", [], {}, [1], ["a"], [None], {"a": 1}, {"type": "yarn"}, {"rope_type": "default"},
    {"type": "default"}, {"content": None}, {"content": 5}, {"content": "<|endoftext|>"}, [[]], [[[1]]],
]  # fmt: skip
DEEP = ["[" * 100_000, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000]


def cases(seed: int, count: int, source: dict[str, Any], names: tuple[str, ...] = ()) -> Iterator[bytes]:
    """Values of other types, extreme numbers, deep nesting, fields left out or put in (of `names` too), or bytes."""
    rng = random.Random(seed)
    plain = byte_cases(seed, count, json.dumps(source).encode())
    for _ in range(count):
        text, draw = next(plain), rng.random()
        if draw < 0.8:
            value = copy.deepcopy(source)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                _change(rng, value, names)
            text = json.dumps(value).encode()
        elif draw < 0.84:
            text = f"{{{json.dumps(rng.choice(sorted(source)))}: {rng.choice(DEEP)}}}".encode()
        elif draw < 0.87:
            text = rng.choice(
                (b"\xef\xbb\xbf" + text, text.decode("latin1").encode("utf-16"), text + b"\0", b"[]", b"")
            )
        yield text


def _change(rng: random.Random, value: dict[str, Any], names: tuple[str, ...]) -> None:
    """Changes `value`, or something within it, in place."""
    inner = [one for one in value.values() if isinstance(one, dict) and one]
    if inner and rng.random() < 0.4:
        return _change(rng, rng.choice(inner), names)
    name = rng.choice([*value, *names] or ["a"])
    draw = rng.random()
    if draw < 0.1:
        value.pop(name, None)
    elif draw < 0.2 and type(value.get(name)) in (int, float):
        old = value[name]
        value[name] = rng.choice((old * 2, old + 1, old / 2 if abs(old) < 1e300 else 0.5, repr(old)[:300], -old))
    else:
        value[name] = copy.deepcopy(rng.choice(NUMBERS if draw < 0.6 else OTHERS))
    return None
