"""A command's settings, declared once as dataclass fields; its command line is generated from them.

A field `micro_batch_size` is the flag `--micro-batch-size` and, in the scripts, the setting MICRO_BATCH_SIZE.
Every flag takes a value (`--append-eod true`), so scripts pass settings on unchanged.
"""

import argparse
import dataclasses
import inspect
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.errors import KitError
from common.hub import local_folder

T = TypeVar("T")

KIT = Path(__file__).parents[1]
DECLARED = re.compile(r'^: "\$\{([A-Z0-9_]+):=', re.MULTILINE)  # as `settings` in common/shell/lib.sh finds them
STEPS, OLD_NAMES = "*/[0-9]_*.sh", "common/shell/train.sh"  # whose settings the environment may give
LEAST_LETTERS = 6  # in a name that may be a misspelled setting; a typo is tolerated from two more on
# Other programs' variables that resemble a setting, or have the name of a flag that is no script's setting.
OTHERS = {"PARTITION", "NUM_WORKERS"}


def option(
    default: Any = dataclasses.MISSING, help: str = "", choices: Sequence[str] = (), hub: str | None = None
) -> Any:
    """A dataclass field with its help text; without `default` its flag is required.

    hub: the field is a folder that may be given as an id, whose files of that purpose (hub.FILES) are then fetched.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices), "hub": hub})


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds one flag to `parser` for each field of the dataclass `settings`.

    If `settings` inherits from several dataclasses, `--help` groups the flags under the first line of each docstring.
    The flag of a `tuple[str, ...]` field may be repeated.
    """
    kinds = typing.get_type_hints(settings)
    for heading, fields in _by_heading(settings):
        group = parser.add_argument_group(heading) if heading else parser
        for field in fields:
            _add_option(group, field, kinds[field.name])


def add_commands(
    parser: argparse.ArgumentParser, commands: Mapping[str, tuple[type, Any]]
) -> dict[str, argparse.ArgumentParser]:
    """Adds to `parser` one subcommand, the attribute `command`, for each name of `commands`; returns their parsers.

    The flags and the help of a subcommand are those of its settings, the first element of the tuple.
    """
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    added = {}
    for name, (settings, _) in commands.items():
        added[name] = subparsers.add_parser(name, help=settings.__doc__, description=settings.__doc__)
        add_options(added[name], settings)
    return added


def _by_heading(settings: type) -> Iterator[tuple[str | None, list[dataclasses.Field[Any]]]]:
    fields = dataclasses.fields(settings)
    if len(settings.__bases__) == 1:
        yield None, list(fields)
        return
    for group in (*reversed(settings.__bases__), settings):
        names = inspect.get_annotations(group)
        yield (group.__doc__ or "").split("\n")[0].rstrip("."), [field for field in fields if field.name in names]


def _add_option(group: Any, field: dataclasses.Field[Any], kind: Any) -> None:
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    repeated = typing.get_origin(kind) is tuple
    shown = "" if required or repeated or default is None else f" (default: {_shown(default)})"
    group.add_argument(
        "--" + field.name.replace("_", "-"),
        action="append" if repeated else "store",
        type=str if repeated else _reader(kind),
        required=required,
        default=None if repeated else default,
        choices=field.metadata.get("choices") or None,
        metavar=None if field.metadata.get("choices") else kind_name(kind),
        help=(field.metadata.get("help", "") + shown).replace("%", "%%"),
    )


def from_namespace(settings: type[T], namespace: argparse.Namespace) -> T:
    """An instance of `settings` from the parsed flags, with the folders of models that are given by their ids."""
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    values = {field.name: getattr(namespace, field.name) for field in fields}
    for field in fields:
        purpose, value = field.metadata.get("hub"), values[field.name]
        if purpose and value:
            values[field.name] = local_folder(value, field.name.upper(), purpose)
    repeated = {field.name for field in fields if isinstance(field.default, tuple)}
    return settings(**{name: tuple(value or ()) if name in repeated else value for name, value in values.items()})


def to_flags(settings: Any) -> list[str]:
    """The command line that reproduces `settings`; fields that are None are left out."""
    flags = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        # NAME=VALUE in one word, because a value may start with a dash.
        flags += [f"--{field.name.replace('_', '-')}={_shown(each)}" for each in values]
    return flags


def require(settings: Any, name: str, holds: bool, rule: str) -> None:
    """Raises KitError with the setting's value and `rule` unless `holds`."""
    if not holds:
        raise KitError(f"{name.upper()}={getattr(settings, name)}: {rule}")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _core(kind: Any) -> Any:
    """`int | None` -> `int`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def kind_name(kind: Any) -> str:
    """What `--help` shows for a value of that type: true|false (|auto, which is None), N, X or TEXT."""
    if _core(kind) is bool and kind is not bool:
        return "true|false|auto"
    return {bool: "true|false", int: "N", float: "X"}.get(_core(kind), "TEXT")


def _reader(kind: Any) -> Any:
    if _core(kind) is bool:
        return _read_bool if kind is bool else _read_bool_or_auto
    return _core(kind)


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def _read_bool_or_auto(text: str) -> bool | None:
    return None if text.lower() == "auto" else _read_bool(text)


def check_environment(settings: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Raises KitError for names in `environment` that resemble a setting but are none, and suggests the nearest one.

    The settings of all steps are accepted. A field of `settings` that no script passes on is refused as well, unless
    its flag has the same value.
    """
    scripts = declared(STEPS, OLD_NAMES)
    flags = {field.name.upper(): field.name for field in dataclasses.fields(settings)}
    known = scripts | OTHERS | {name for pattern in ("*/*.sh", "common/shell/*.sh") for name in declared(pattern)}
    wrong = []
    for name, value in environment.items():
        if name in flags and name not in known:
            if value.lower() != _shown(getattr(settings, flags[name])):
                flag = f"--{flags[name].replace('_', '-')}={value}"
                wrong.append(f"{name}={value} is not read from the environment: pass `-- {flag}`, or unset it")
        elif name not in known and (nearest := nearest_setting(name, scripts, environment)):
            wrong.append(f"{name} is in the environment but is not a setting: write {nearest}, or unset it")
    if wrong and scripts:
        raise KitError("; ".join(wrong))


def declared(*patterns: str) -> set[str]:
    """The names of the settings declared in the kit's scripts that match `patterns`."""
    files = [path for pattern in patterns for path in KIT.glob(pattern)]
    return {name for path in files for name in DECLARED.findall(path.read_text(encoding="utf-8"))}


def nearest_setting(name: str, settings: Collection[str], given: Collection[str] = ()) -> str | None:
    """The one of `settings` that `name` probably stands for; None if it resembles none.

    Its letters are equal, ignoring case and underscores, or differ by one typo; or it is the beginning of a setting
    that is not `given` (SEQ_LEN).
    """
    letters = _letters(name)
    if len(letters) < LEAST_LETTERS:
        return None
    for setting in sorted(settings):
        if letters == _letters(setting):
            return setting
    for setting in sorted(settings):
        if len(letters) >= LEAST_LETTERS + 2 and _is_one_typo(letters, _letters(setting)):
            return setting
    begun = [setting for setting in sorted(settings) if "_" in name and _letters(setting).startswith(letters)]
    return begun[0] if begun and begun[0] not in given else None


def _letters(name: str) -> str:
    return name.upper().replace("_", "")


def _is_one_typo(one: str, other: str) -> bool:
    """Whether one letter is added, missing, replaced, or swapped with its neighbor."""
    start = len(os.path.commonprefix((one, other)))
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[:2][::-1] and a[2:] == b[2:])
