"""Untrusted JSON files, such as config.json, parsed strictly and within limits that the json module does not set."""

import json
from pathlib import Path
from typing import Any

from common.errors import KitError

MAX_BYTES = 16 << 20  # an index of 100,000 tensors has 10 MB; parsed, it takes about twenty times as much
MAX_DEPTH = 64
MAX_DIGITS = 300  # of an int; a float has no more


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in the file at `path`; raises KitError, which ends in `remedy`, for anything else.

    That includes duplicate keys with different values, which readers resolve differently, and invalid Unicode.
    PermissionError is not converted.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except PermissionError:
        raise  # a new copy would not help
    except OSError as error:
        raise KitError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if len(data) > MAX_BYTES:
        raise KitError(f"{path} is larger than {MAX_BYTES >> 20} MiB: {remedy}")
    if data[:3] == b"\xef\xbb\xbf":
        raise KitError(f"{path} begins with a byte-order mark, which JSON does not allow: save it as UTF-8 without one")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_parse_int)
        _check(value)
    except RecursionError as error:
        raise KitError(f"{path} is nested deeper than {MAX_DEPTH}: {remedy}") from error
    except ValueError as error:
        raise KitError(f"{path} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise KitError(f"{path} is not a JSON object: {remedy}")
    return value


def shown(value: Any) -> str:
    """`value` for a message: up to 100 characters, without control characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        for name, value in pairs:
            if repr(made[name]) != repr(value):
                raise ValueError(f"{shown(name)} is a duplicate key")
    return made


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _check(value: Any, depth: int = 0) -> None:
    """Raises RecursionError for values nested too deep, ValueError for unpaired surrogates."""
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
