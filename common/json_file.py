"""The small JSON files beside weights, which anybody may have written: read whole, or refused in words."""

import json
from pathlib import Path
from typing import Any

from common.errors import KitError

MAX_BYTES = 16 << 20  # an index of 100,000 tensors has 10 MB; what Python makes of it takes some twenty times as much
MAX_DEPTH = 64
MAX_DIGITS = 300  # of a whole number: a float holds no more


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in the file at `path`; raises KitError, which ends in `remedy`, for what else is there.

    So also where a name stands twice with two values, of which readers take either, or where text is no Unicode. Where
    it may not be read, PermissionError is left as it is.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except PermissionError:
        raise  # no copy mends that
    except OSError as error:
        raise KitError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if len(data) > MAX_BYTES:
        raise KitError(f"{path} has more than {MAX_BYTES >> 20} MiB, which no such file has: {remedy}")
    if data[:3] == b"\xef\xbb\xbf":
        raise KitError(f"{path} begins with a byte-order mark, which JSON has not: save it as UTF-8 without one")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_whole)
        _check(value)
    except RecursionError as error:
        raise KitError(f"{path} is nested deeper than {MAX_DEPTH}: {remedy}") from error
    except ValueError as error:
        raise KitError(f"{path} is no JSON ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise KitError(f"{path} holds no JSON object: {remedy}")
    return value


def shown(value: Any) -> str:
    """`value` of a JSON file for a message: 100 characters at most, none of which a terminal obeys."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        for name, value in pairs:
            if repr(made[name]) != repr(value):
                raise ValueError(f"{shown(name)} stands there twice")
    return made


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _check(value: Any, depth: int = 0) -> None:
    """Raises RecursionError or ValueError for what is nested too deep, and for text with half a character."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict):
        for name, one in value.items():
            name.encode("utf-8")
            _check(one, depth + 1)
    elif isinstance(value, list):
        for one in value:
            _check(one, depth + 1)
