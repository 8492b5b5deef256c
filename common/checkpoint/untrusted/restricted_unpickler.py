"""Unpickling that runs no code of the file: plain objects are made, Megatron's become inert, all else is refused.

Python's own unpickler with a hand on each opcode that calls, makes or changes something, and without those that torch,
Megatron-Core and pickle's protocols 2 to 5 do not write in a checkpoint. What a name stands for: `allowed_globals`.
"""

import collections
import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy

from common.checkpoint.untrusted.allowed_globals import RESTORE, find_global, is_key
from common.checkpoint.untrusted.placeholders import Global, Inert
from common.errors import KitError

_AS_THEY_ARE = [opcode[0] for opcode in (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8,
    pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
    pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE,
    pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.GLOBAL, pickle.STACK_GLOBAL,
    pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.MEMOIZE, pickle.BINPERSID,
)]  # fmt: skip
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_SIZED = frozenset({str, bytes, list, tuple, dict})
_COPIES = 8  # of each byte: the pickler has those of an array copied twice, from text of up to two bytes for each
_WEIGHT, _SET_BYTES, _CLASS_BYTES = 64, 256, 2048  # of memory: of a byte of the file, of an empty set, of a class
_SMALL_BYTES = 1 << 16
_SAME_HASHES = 1000  # keys of one hash are compared one by one, and all but those of text can be chosen
_WITHOUT = ", or convert it by step 2 to Hugging Face and back, which does without"
_python_unpickler: Any = pickle._Unpickler


def _stands_for_one(value: Any) -> bool:
    """Whether `value` stands for a function or class."""
    return type(value) is Global or isinstance(value, type) and issubclass(value, Inert)


def _name(value: Any) -> str:
    """How to call it; nothing of what it holds, which may be large or endless."""
    if type(value) is Global:
        return f"{value.module}.{value.name}"
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__name__}"


def _readable(text: str) -> str:
    """`text` without what a terminal obeys, and not longer than a line or two."""
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[:300])
    return shown + ("..." if len(text) > 300 else "")


def _left_out(name: str) -> Callable[[Any], None]:
    """What is done at an opcode that checkpoints do without."""

    def load(unpickler: Any) -> None:
        unpickler.refuse(f"holds the opcode {name} of pickle, which is not written today")

    return load


class RestrictedUnpickler(_python_unpickler):
    """Gives the object that `data` pickles; raises KitError, naming `source`, for all that could do more.

    What passes without `foreign` does no harm either where torch or pickle read the same bytes with the real classes,
    and takes no more memory than some multiple of its size. With `foreign`, names of Megatron's that nobody knows here
    become inert: for files that are read by this kit alone.
    """

    def __init__(self, data: io.BytesIO | bytes, source: Path, *, foreign: bool = False) -> None:
        stream = data if isinstance(data, io.BytesIO) else io.BytesIO(data)
        super().__init__(stream, encoding="utf-8")
        self.stream, self.source, self.foreign = stream, source, foreign
        self.size = len(stream.getbuffer())
        self.left = _COPIES * self.size  # bytes and elements that calls may copy
        self.free = _WEIGHT * self.size + _SMALL_BYTES  # of memory, for what takes far more than its opcodes
        self.hashes: dict[int, set[int]] = {}  # of the keys of each dict and set, by its id
        self.same_hashes = 0

    def load(self) -> Any:
        """The object; raises KitError for what is not allowed, and anything else where it is damaged."""
        self.read, self.readline = self.stream.read, self.stream.readline
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.append, self.proto, self.framed = self.stack.append, 0, False
        read, dispatch = self.read, self.dispatch
        try:
            while opcode := read(1):
                dispatch[opcode[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]  # how Python's own ends too
            return stop.value
        raise EOFError("it ends early")

    def load_frame(self) -> None:
        """Runs the opcodes of a frame, which must end with it: of one that does not, the C unpickler loses a part."""
        (size,) = struct.unpack("<Q", self.read(8))
        read, tell, dispatch = self.read, self.stream.tell, self.dispatch
        end = tell() + size
        if end > self.size:
            raise EOFError("it ends early")
        if self.framed:
            self.refuse("holds a frame that lies in another")
        self.framed = True
        while (place := tell()) < end:
            dispatch[read(1)[0]](self)
        self.framed = False
        if place > end:
            self.refuse("holds a frame that ends within an opcode")

    def refuse(self, what: str, way_out: str = "") -> NoReturn:
        """Raises KitError: the source does `what`."""
        raise KitError(
            f"{self.source} {_readable(what)}, which loading weights does not need and which could run code: it was not"
            f" loaded; take the file from a source you trust{way_out}"
        )

    def find_class(self, module: str, name: str) -> Any:
        """What `module`.`name` stands for here."""
        found = find_global(module, name, foreign=self.foreign)
        if found is None:
            known = find_global(module, name, foreign=True) is not None
            self.refuse(f"asks for {module}.{name}", _WITHOUT if known else "")
        if self.foreign and isinstance(found, type):
            self._weigh(_CLASS_BYTES)
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Nothing: storages stand in archives alone."""
        self.refuse("asks for a storage outside an archive")

    def pay(self, size: int) -> None:
        """Counts what is copied."""
        self.left -= size
        if self.left < 0:
            self.refuse("copies what it holds again and again")

    def _weigh(self, size: int) -> None:
        """Counts memory."""
        self.free -= size
        if self.free < 0:
            self.refuse("makes sets or classes without end")

    def _check_keys(self, keys: list[Any], hashes: set[int]) -> None:
        """Counts keys of one hash, beside `hashes` of a dict or set: some megabytes can have it search for hours."""
        before = len(hashes)
        hashes.update(map(hash, keys))
        self.same_hashes += before + len(keys) - len(hashes)
        if self.same_hashes > _SAME_HASHES:
            self.refuse("has keys of one hash, or one key again and again")

    def _make(self, called: Any, args: Any, *, new: bool) -> Any:
        name = _name(called)
        if type(args) is not tuple:
            self.refuse(f"calls {name} with something else than arguments")
        for arg in args:
            if type(arg) in _SIZED:
                self.pay(len(arg))
        function = (called.new if new else called.call) if _stands_for_one(called) else None
        if function is None:
            self.refuse(f"calls {name}")
        try:
            return function(*args)
        except Exception:  # whatever torch and numpy raise
            self.refuse(f"calls {name} with other arguments than the pickler writes")

    def load_reduce(self) -> None:
        """Calls a function or class."""
        args = self.stack.pop()
        self.stack[-1] = self._make(self.stack[-1], args, new=False)

    def load_newobj(self) -> None:
        """Calls the `__new__` of a class."""
        args = self.stack.pop()
        self.stack[-1] = self._make(self.stack[-1], args, new=True)

    def load_build(self) -> None:
        """Gives an object its state."""
        state = self.stack.pop()
        target = self.stack[-1]
        kind = type(target)
        if type(state) in _SIZED:
            self.pay(len(state))
        if kind is numpy.ndarray and type(state) is tuple and len(state) == 5 and type(state[4]) is bytes:
            self.pay(len(state[4]))
        restore = kind.restore if issubclass(kind, Inert) else RESTORE.get(kind)
        if restore is None:
            self.refuse(f"sets the state of {_name(target)}")
        try:
            restore(target, state)
        except Exception:  # as above
            self.refuse(f"sets a state of {_name(kind)} that the pickler does not write")

    def load_setitem(self) -> None:
        """One entry of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """Entries of a dict."""
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in _DICTS or len(items) % 2:
            self.refuse(f"sets entries of {type(target).__name__}")
        keys = items[::2]
        for key in keys:
            if type(key) is not str and not is_key(key):
                self.refuse(f"has {type(key).__name__} as a key")
        hashed = [key for key in keys if type(key) is not str]
        if hashed:
            self._check_keys(hashed, self.hashes.setdefault(id(target), set()))
        for key, value in zip(keys, items[1::2], strict=True):
            target[key] = value

    def load_append(self) -> None:
        """One element of a list."""
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        """Elements of a list."""
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            self.refuse(f"appends to {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def load_empty_set(self) -> None:
        """A set."""
        self._weigh(_SET_BYTES)
        self.append(set())

    def load_additems(self) -> None:
        """Elements of a set."""
        items, target = self.pop_mark(), self.stack[-1]
        if type(target) is not set or not all(is_key(item) for item in items):
            self.refuse(f"adds to {type(target).__name__} what is no plain value")
        self._check_keys(items, self.hashes.setdefault(id(target), set()))
        target.update(items)

    def load_frozenset(self) -> None:
        """A frozenset."""
        items = self.pop_mark()
        if not all(is_key(item) for item in items):
            self.refuse("has a frozenset of what is no plain value")
        self._weigh(_SET_BYTES)
        self._check_keys(items, set())
        self.append(frozenset(items))

    def load_long_binput(self) -> None:
        """Remembers the newest object; the C unpickler has a table as long as the largest number."""
        (number,) = struct.unpack("<I", self.read(4))
        if number > len(self.memo):
            self.refuse(f"remembers an object as number {number} of {len(self.memo)}")
        self.memo[number] = self.stack[-1]

    dispatch = {opcode.code.encode("latin1")[0]: _left_out(opcode.name) for opcode in pickletools.opcodes}
    dispatch.update({opcode: _python_unpickler.dispatch[opcode] for opcode in _AS_THEY_ARE})
    dispatch.update({
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends, pickle.EMPTY_SET[0]: load_empty_set,
        pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
        pickle.LONG_BINPUT[0]: load_long_binput, pickle.FRAME[0]: load_frame,
    })  # fmt: skip
