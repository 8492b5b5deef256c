"""A command's settings: declared once as dataclass fields, from which its command line is made.

A field `micro_batch_size` is the flag `--micro-batch-size` and, in the scripts, the setting MICRO_BATCH_SIZE.
Every flag takes a value (`--append-eod true`), so a script passes a setting as it is.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any = dataclasses.MISSING, help: str = "", choices: Sequence[str] = ()) -> Any:
    """A field with its help; without `default` it is required on the command line."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices)})


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Gives `parser` one flag for each field of the dataclass `settings`."""
    kinds = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        told = "" if required or default is None else f" (default: {_shown(default)})"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=_reader(kinds[field.name]),
            required=required,
            default=default,
            choices=field.metadata.get("choices") or None,
            metavar=None if field.metadata.get("choices") else _kind_name(kinds[field.name]),
            help=(field.metadata.get("help", "") + told).replace("%", "%%"),
        )


def from_namespace(settings: type[T], namespace: argparse.Namespace) -> T:
    """An instance of `settings` with the values of its flags."""
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: getattr(namespace, name) for name in names})


def to_flags(settings: Any) -> list[str]:
    """The command line that gives `settings` again; fields that are None are left out."""
    values = ((field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    # NAME=VALUE in one word: a value may begin with a dash.
    return [f"--{name.replace('_', '-')}={_shown(value)}" for name, value in values if value is not None]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _core(kind: Any) -> Any:
    """`int | None` -> `int`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _kind_name(kind: Any) -> str:
    return {bool: "true|false", int: "N", float: "X"}.get(_core(kind), "TEXT")


def _reader(kind: Any) -> Any:
    return _read_bool if _core(kind) is bool else _core(kind)


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"
