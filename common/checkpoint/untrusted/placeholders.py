"""Placeholders for the functions and classes that a pickle references.

Each accepts only what the pickler writes for it. So a pickle that loads here creates only plain objects, and does so as
well where torch loads it with the real ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

SCALARS = frozenset({str, int, float, bool, complex, bytes, type(None), torch.dtype})
T = TypeVar("T", bound="Inert")


@dataclass(frozen=True)
class Global:
    """Placeholder for `module`.`name`: `call` and `new` (its `__new__`) are None where they are not allowed.

    Both raise ValueError or TypeError for arguments that the pickler does not write.
    """

    module: str
    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


class Inert:
    """Placeholder for an instance of a class that is never created here: it keeps its arguments and state."""

    args: tuple[Any, ...] = ()  # empty where it was created without a call, as dataclasses are
    state: Any = None
    hashable = True  # may be a dict key; hashed by identity

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.args}"

    @classmethod
    def _made(cls: type[T], *args: Any) -> T:
        made = cls()
        made.args = args
        return made

    @classmethod
    def call(cls: type[T], *args: Any) -> T:
        """Calls the class; raises ValueError for arguments that the pickler does not write."""
        return cls._made(*args)

    @classmethod
    def new(cls: type[T], *args: Any) -> T:
        """Calls its `__new__`; raises ValueError likewise."""
        return cls._made(*args)

    def restore(self, state: Any) -> None:
        """Sets the state; raises ValueError for one that the class does not have."""
        self.state = state


class InertDataclass(Inert):
    """For a dataclass (its state is named fields) or a named tuple (scalars and placeholders)."""

    hashable = False  # the real one may hash any of its fields

    @classmethod
    def call(cls: type[T], *args: Any) -> T:
        """Accepts no arguments."""
        require(not args)
        return cls()

    @classmethod
    def new(cls: type[T], *args: Any) -> T:
        """Accepts the fields of a named tuple, or none."""
        require(all(type(arg) in SCALARS or isinstance(arg, Inert) for arg in args))
        return cls._made(*args)

    def restore(self, state: Any) -> None:
        """Accepts named fields."""
        self.state = named_fields(state)


class InertEnum(Inert):
    """For an enum member, by its value: a scalar, or a named tuple of scalars."""

    @classmethod
    def call(cls: type[T], *args: Any) -> T:
        """Accepts one value."""
        require(len(args) == 1 and (type(args[0]) in SCALARS or isinstance(args[0], InertDataclass)))
        return cls._made(*args)

    @classmethod
    def new(cls: type[T], *args: Any) -> T:
        """Not allowed."""
        raise ValueError

    def restore(self, state: Any) -> None:
        """Not allowed."""
        raise ValueError


class InertCall(InertEnum):
    """For a class that is called with scalars, such as a path with its parts."""

    @classmethod
    def call(cls: type[T], *args: Any) -> T:
        """Accepts scalars."""
        require(all(type(arg) in SCALARS for arg in args))
        return cls._made(*args)


class InertBytesIO(InertDataclass):
    """For io.BytesIO: its state is (bytes, position, None)."""

    def restore(self, state: Any) -> None:
        """Accepts bytes and a position within them."""
        require(type(state) is tuple and [type(one) for one in state] == [bytes, int, type(None)])
        require(0 <= state[1] <= len(state[0]))
        self.state = state


def is_int64(value: Any) -> bool:
    """Whether `value` is an int of 64 bits: computing with longer ones can take arbitrarily long."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def is_size_int(value: Any) -> bool:
    """Whether `value` is a non-negative int of 64 bits."""
    return is_int64(value) and value >= 0


def require(condition: bool) -> None:
    """Raises ValueError unless `condition` holds."""
    if not condition:
        raise ValueError


def named_fields(state: Any) -> dict[str, Any]:
    """`state`, a dict of field names without dunder names; raises ValueError for anything else."""
    require(type(state) is dict and all(type(name) is str and not name.startswith("__") for name in state))
    return dict(state)


def inert_class(kind: type[Inert], module: str, name: str) -> type[Inert]:
    """A placeholder class of `kind`, one of those above, for `module`.`name`."""
    return type(name, (kind,), {"__module__": module})
