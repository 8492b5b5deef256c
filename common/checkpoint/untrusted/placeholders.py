"""What stands in the place of the functions and classes that a pickle names: each takes what the pickler writes for it.

So a pickle that passes here makes plain objects alone, and does no more where torch reads it with the real ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

SCALARS = frozenset({str, int, float, bool, complex, bytes, type(None), torch.dtype})
T = TypeVar("T", bound="Inert")


@dataclass(frozen=True)
class Global:
    """Stands for `module`.`name`: what calling it gives, and what its `__new__` gives, where that may be done.

    Both raise ValueError or TypeError for arguments that the pickler does not write.
    """

    module: str
    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


class Inert:
    """Of a class that this process never makes: it keeps what it was made of, and does nothing."""

    args: tuple[Any, ...] = ()  # of one that was made without a call, as dataclasses are
    state: Any = None
    hashable = True  # may be the key of a dict: hashed by identity here

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.args}"

    @classmethod
    def _made(cls: type[T], *args: Any) -> T:
        made = cls()
        made.args = args
        return made

    @classmethod
    def call(cls: type[T], *args: Any) -> T:
        """What the class gives when it is called; raises ValueError for arguments that the pickler does not write."""
        return cls._made(*args)

    @classmethod
    def new(cls: type[T], *args: Any) -> T:
        """The same for its `__new__`."""
        return cls._made(*args)

    def restore(self, state: Any) -> None:
        """Takes the state; raises ValueError for one that the class has not."""
        self.state = state


class Record(Inert):
    """Of a dataclass or a named tuple: a state of named fields, or scalars and other stand-ins for its fields."""

    hashable = False  # the real one may hash whatever it holds

    @classmethod
    def call(cls: type[T], *args: Any) -> T:
        """Without arguments."""
        require(not args)
        return cls()

    @classmethod
    def new(cls: type[T], *args: Any) -> T:
        """With the fields of a named tuple, or none."""
        require(all(type(arg) in SCALARS or isinstance(arg, Inert) for arg in args))
        return cls._made(*args)

    def restore(self, state: Any) -> None:
        """Named fields."""
        self.state = named_fields(state)


class Member(Inert):
    """Of an enum, by its value: a scalar, or a named tuple of them."""

    @classmethod
    def call(cls: type[T], *args: Any) -> T:
        """With one value."""
        require(len(args) == 1 and (type(args[0]) in SCALARS or isinstance(args[0], Record)))
        return cls._made(*args)

    @classmethod
    def new(cls: type[T], *args: Any) -> T:
        """Never."""
        raise ValueError

    def restore(self, state: Any) -> None:
        """Never."""
        raise ValueError


class Plain(Member):
    """Of a class that is called with scalars, as a path with its parts."""

    @classmethod
    def call(cls: type[T], *args: Any) -> T:
        """With scalars."""
        require(all(type(arg) in SCALARS for arg in args))
        return cls._made(*args)


class Buffer(Record):
    """Of io.BytesIO: its state is (bytes, position, None)."""

    def restore(self, state: Any) -> None:
        """The bytes, and a position in them."""
        require(type(state) is tuple and [type(one) for one in state] == [bytes, int, type(None)])
        require(0 <= state[1] <= len(state[0]))
        self.state = state


def is_whole(value: Any) -> bool:
    """Whether it is a whole number of 64 bits: what is reckoned with a longer one takes as long as the file likes."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def is_count(value: Any) -> bool:
    """Whether it is one that counts."""
    return is_whole(value) and value >= 0


def require(condition: bool) -> None:
    """Raises ValueError unless `condition` holds."""
    if not condition:
        raise ValueError


def named_fields(state: Any) -> dict[str, Any]:
    """`state`, which must be a dict of names, as the fields of an instance are."""
    require(type(state) is dict and all(type(name) is str and not name.startswith("__") for name in state))
    return dict(state)


def inert_class(kind: type[Inert], module: str, name: str) -> type[Inert]:
    """The class of `kind`, one of those above, that stands for `module`.`name`."""
    return type(name, (kind,), {"__module__": module})
