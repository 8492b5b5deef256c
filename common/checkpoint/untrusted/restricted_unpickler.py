"""A restricted unpickler that runs no code from the file: only plain objects and placeholders are created.

Python's unpickler, with checks in each opcode that calls, creates or changes something, and without the opcodes that
torch, Megatron-Core and pickle's protocols 2 to 5 do not write in a checkpoint. The allow list: `allowed_globals`.
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

_UNCHANGED = [opcode[0] for opcode in (
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
_COPIES = 8  # per byte: an array's bytes are copied twice, from text of up to two bytes for each
_MEMORY_PER_BYTE, _SET_BYTES, _CLASS_BYTES = 64, 256, 2048  # allowed per byte of the file; of a set; of a class
_SMALL_BYTES = 1 << 16
_MAX_COLLISIONS = 1000  # equal hashes are compared one by one, and a file can choose them for all keys but str
_CONVERT = ", or convert it to Hugging Face and back with step 2, which drops it"
_python_unpickler: Any = pickle._Unpickler


def _is_placeholder(value: Any) -> bool:
    """Whether `value` is the placeholder for a function or class."""
    return type(value) is Global or isinstance(value, type) and issubclass(value, Inert)


def _name(value: Any) -> str:
    """Its name for messages; never its content, which may be large or recursive."""
    if type(value) is Global:
        return f"{value.module}.{value.name}"
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__name__}"


def _readable(text: str) -> str:
    """`text` without control characters, cut to a line or two."""
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[:300])
    return shown + ("..." if len(text) > 300 else "")


def _refused(name: str) -> Callable[[Any], None]:
    """The handler of an opcode that checkpoints do not use."""

    def load(unpickler: Any) -> None:
        unpickler.refuse(f"uses the pickle opcode {name}, which no checkpoint writer uses")

    return load


class RestrictedUnpickler(_python_unpickler):
    """Loads the object in `data`; raises KitError, naming `source`, for anything that is not allowed.

    Without `foreign`, what loads here is also safe to load with torch or pickle and the real classes, and takes memory
    in proportion to its size. With `foreign`, unknown names of Megatron become placeholders: for files that only this
    kit reads.
    """

    def __init__(self, data: io.BytesIO | bytes, source: Path, *, foreign: bool = False) -> None:
        stream = data if isinstance(data, io.BytesIO) else io.BytesIO(data)
        super().__init__(stream, encoding="utf-8")
        self.stream, self.source, self.foreign = stream, source, foreign
        self.size = len(stream.getbuffer())
        self.left = _COPIES * self.size  # bytes and items that calls may still copy
        self.free = _MEMORY_PER_BYTE * self.size + _SMALL_BYTES  # bytes for what is far larger than its opcodes
        self.hashes: dict[int, set[int]] = {}  # of the keys of each dict and set, by id
        self.collisions = 0

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
        except pickle._Stop as stop:  # type: ignore[attr-defined]  # as Python's unpickler does
            return stop.value
        raise EOFError("it is truncated")

    def load_frame(self) -> None:
        """Runs the opcodes of a frame, which must end at an opcode: the C unpickler loses part of one that does not."""
        (size,) = struct.unpack("<Q", self.read(8))
        read, tell, dispatch = self.read, self.stream.tell, self.dispatch
        end = tell() + size
        if end > self.size:
            raise EOFError("it is truncated")
        if self.framed:
            self.refuse("has nested frames")
        self.framed = True
        while (place := tell()) < end:
            dispatch[read(1)[0]](self)
        self.framed = False
        if place > end:
            self.refuse("has a frame that ends within an opcode")

    def refuse(self, what: str, remedy: str = "") -> NoReturn:
        """Raises KitError saying that the source does `what`."""
        raise KitError(
            f"{self.source} {_readable(what)}, which loading weights does not need and could run code: it was not"
            f" loaded; take the file from a source you trust{remedy}"
        )

    def find_class(self, module: str, name: str) -> Any:
        """The placeholder for `module`.`name`; raises KitError where it is not allowed."""
        found = find_global(module, name, foreign=self.foreign)
        if found is None:
            known = find_global(module, name, foreign=True) is not None
            self.refuse(f"references {module}.{name}", _CONVERT if known else "")
        if self.foreign and isinstance(found, type):
            self._use_memory(_CLASS_BYTES)
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Refused: only archives have storages."""
        self.refuse("references a storage outside an archive")

    def count_copied(self, size: int) -> None:
        """Counts copied bytes or items; raises KitError above the limit."""
        self.left -= size
        if self.left < 0:
            self.refuse("copies its content too often")

    def _use_memory(self, size: int) -> None:
        """Counts memory; raises KitError above the limit."""
        self.free -= size
        if self.free < 0:
            self.refuse("creates too many sets or classes")

    def _check_keys(self, keys: list[Any], hashes: set[int]) -> None:
        """Counts hash collisions with `hashes`, those of a dict or set: a few MB of them could take hours."""
        before = len(hashes)
        hashes.update(map(hash, keys))
        self.collisions += before + len(keys) - len(hashes)
        if self.collisions > _MAX_COLLISIONS:
            self.refuse("has too many keys with equal hashes")

    def _call(self, called: Any, args: Any, *, new: bool) -> Any:
        name = _name(called)
        if type(args) is not tuple:
            self.refuse(f"calls {name} with arguments that are not a tuple")
        for arg in args:
            if type(arg) in _SIZED:
                self.count_copied(len(arg))
        function = (called.new if new else called.call) if _is_placeholder(called) else None
        if function is None:
            self.refuse(f"calls {name}")
        try:
            return function(*args)
        except Exception:  # whatever torch and numpy raise
            self.refuse(f"calls {name} with arguments that the pickler does not write")

    def load_reduce(self) -> None:
        """REDUCE: calls a function or class."""
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args, new=False)

    def load_newobj(self) -> None:
        """NEWOBJ: calls the `__new__` of a class."""
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args, new=True)

    def load_build(self) -> None:
        """BUILD: sets the state of an object."""
        state = self.stack.pop()
        target = self.stack[-1]
        kind = type(target)
        if type(state) in _SIZED:
            self.count_copied(len(state))
        if kind is numpy.ndarray and type(state) is tuple and len(state) == 5 and type(state[4]) is bytes:
            self.count_copied(len(state[4]))
        restore = kind.restore if issubclass(kind, Inert) else RESTORE.get(kind)
        if restore is None:
            self.refuse(f"sets the state of {_name(target)}")
        try:
            restore(target, state)
        except Exception:  # as above
            self.refuse(f"sets a state of {_name(kind)} that the pickler does not write")

    def load_setitem(self) -> None:
        """SETITEM: one entry of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """SETITEMS: entries of a dict."""
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
        """APPEND: one item of a list."""
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        """APPENDS: items of a list."""
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            self.refuse(f"appends to {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def load_empty_set(self) -> None:
        """EMPTY_SET."""
        self._use_memory(_SET_BYTES)
        self.append(set())

    def load_additems(self) -> None:
        """ADDITEMS: items of a set."""
        items, target = self.pop_mark(), self.stack[-1]
        if type(target) is not set or not all(is_key(item) for item in items):
            self.refuse(f"adds unhashable or unknown items to {type(target).__name__}")
        self._check_keys(items, self.hashes.setdefault(id(target), set()))
        target.update(items)

    def load_frozenset(self) -> None:
        """FROZENSET."""
        items = self.pop_mark()
        if not all(is_key(item) for item in items):
            self.refuse("has a frozenset of unhashable or unknown items")
        self._use_memory(_SET_BYTES)
        self._check_keys(items, set())
        self.append(frozenset(items))

    def load_long_binput(self) -> None:
        """LONG_BINPUT: memoizes the top of the stack; the C unpickler allocates a table up to the largest index."""
        (number,) = struct.unpack("<I", self.read(4))
        if number > len(self.memo):
            self.refuse(f"memoizes an object at index {number} of {len(self.memo)}")
        self.memo[number] = self.stack[-1]

    dispatch = {opcode.code.encode("latin1")[0]: _refused(opcode.name) for opcode in pickletools.opcodes}
    dispatch.update({opcode: _python_unpickler.dispatch[opcode] for opcode in _UNCHANGED})
    dispatch.update({
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends, pickle.EMPTY_SET[0]: load_empty_set,
        pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
        pickle.LONG_BINPUT[0]: load_long_binput, pickle.FRAME[0]: load_frame,
    })  # fmt: skip
