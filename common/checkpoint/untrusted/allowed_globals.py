"""The globals that a checkpoint's pickle may reference (the allow list), and the placeholder for each.

The real ones are not used where they do too much: numpy's dtype, with a state from the file, makes objects from any
bytes; bytearray, with a number, allocates any memory; a class, with a state, sets any attribute. Allowed is what pickle
and torch.save write in the checkpoints of Megatron-Core, Megatron-LM and this kit. torch's own allow list
(`weights_only`) lacks Megatron's classes and uses the real functions.
"""

import argparse
import collections
import re
import signal
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy
import torch

from common.checkpoint.untrusted.pickled_tensors import MAX_DIMENSIONS, REBUILD, STORAGES, rebuild_from_type
from common.checkpoint.untrusted.placeholders import (
    SCALARS,
    Global,
    Inert,
    InertBytesIO,
    InertCall,
    InertDataclass,
    InertEnum,
    inert_class,
    is_int64,
    named_fields,
    require,
)


class NumpyDtype:
    """Placeholder for numpy.dtype, of numbers only."""

    def __init__(self, code: Any, align: Any, copy: Any) -> None:
        # Without a copy it is numpy's shared dtype, whose byte order the following state would change for everyone.
        require(type(code) is str and align in (False, 0) and copy in (True, 1))
        require(re.fullmatch(r"[biufc](1|2|4|8|16)", code) is not None)
        self.dtype = numpy.dtype(code)

    def restore(self, state: Any) -> None:
        """Accepts a state without fields or flags."""
        require(type(state) is tuple and all(type(one) in SCALARS for one in state))
        require(state[:2] in ((3, "<"), (3, "|")) and state[2:] == (None, None, None, -1, -1, 0))


def is_key(value: Any, size: int = MAX_DIMENSIONS) -> bool:
    """Whether `value` may be a dict key: hashing it is fast and runs no foreign code.

    Nested tuples and frozensets may have up to about `size` items in all, since hashing visits each.
    """
    kind = type(value)
    if kind is int:
        return is_int64(value)
    if kind in SCALARS or kind in _KEYS:
        return True
    if kind is torch.Size:
        return len(value) <= size
    if kind is tuple or kind is frozenset:
        return len(value) <= size and all(is_key(one, size // (len(value) + 1)) for one in value)
    return isinstance(value, Inert) and value.hashable


def _elements(values: Any) -> list[Any]:
    require(type(values) in (list, tuple) and all(is_key(value) for value in values))
    require(len(values) - len(set(map(hash, values))) <= MAX_DIMENSIONS)  # with equal hashes
    return list(values)


def _encode(text: Any, encoding: Any) -> bytes:
    """`codecs.encode` as pickle's protocol 2 uses it: bytes as latin-1 text."""
    require(type(text) is str and encoding in ("latin1", "latin-1"))
    return str(text).encode("latin1")


def _bytes() -> bytes:
    return b""


def _bytearray(*args: Any) -> bytearray:
    require([type(arg) for arg in args] in ([], [bytes]))
    return bytearray(*args)


def _range(*args: Any) -> range:
    require(all(is_int64(arg) for arg in args))
    return range(*args)


def _slice(start: Any, stop: Any, step: Any) -> slice:
    require(all(type(arg) in SCALARS for arg in (start, stop, step)))
    return slice(start, stop, step)


def _complex(real: Any, imag: Any) -> complex:
    require(type(real) is type(imag) is float)
    return complex(real, imag)


def _ordered_dict() -> collections.OrderedDict[Any, Any]:
    return collections.OrderedDict()


def _counter(counts: Any) -> collections.Counter[Any]:
    require(type(counts) is dict)
    return collections.Counter(counts)


def _defaultdict(factory: Any) -> collections.defaultdict[Any, Any]:
    require(factory is None or type(factory) is Global and factory.name in _FACTORIES)
    return collections.defaultdict(factory and _FACTORIES[factory.name])


def _size(sizes: Any) -> torch.Size:
    require(type(sizes) is tuple and len(sizes) <= MAX_DIMENSIONS and all(is_int64(size) for size in sizes))
    return torch.Size(sizes)


def _device(*args: Any) -> torch.device:
    require([type(arg) for arg in args] in ([str], [str, int]))
    return torch.device(*args)


def _layout(name: Any) -> Any:
    require(type(name) is str)
    return torch.serialization._get_layout(name)


def _torch_version(text: Any) -> str:
    require(type(text) is str)
    return torch.torch_version.TorchVersion(text)


def _memory_format(value: Any) -> Any:
    from torch.distributed.checkpoint import metadata as dcp

    require(is_int64(value))
    if hasattr(dcp, "_MEM_FORMAT_ENCODING"):
        return dcp._MEM_FORMAT_ENCODING(value)
    from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING  # until torch 2.2

    return MEM_FORMAT_ENCODING(value)


def _reconstruct(kind: Any, shape: Any, code: Any) -> Any:
    require(type(kind) is Global and kind.name == "ndarray" and type(shape) is tuple and shape == (0,) and code == b"b")
    return numpy.empty(0, numpy.int8)


def _scalar(dtype: Any, data: Any) -> Any:
    require(type(dtype) is NumpyDtype and type(data) is bytes and len(data) == dtype.dtype.itemsize)
    return numpy.frombuffer(data, dtype.dtype)[0]


def _restore_array(array: Any, state: Any) -> None:
    require(type(state) is tuple and len(state) == 5)
    version, shape, dtype, fortran, data = state
    require(type(version) is int and version == 1 and type(fortran) is bool)
    require(type(dtype) is NumpyDtype and type(data) is bytes and all(size >= 0 for size in _size(shape)))
    require(dtype.dtype.itemsize * _size(shape).numel() == len(data))
    array.__setstate__((1, shape, dtype.dtype, fortran, data))


def _restore_ordered_dict(value: Any, state: Any) -> None:
    """Accepts the attribute that Module.state_dict sets on its result."""
    require(type(state) is dict and set(state) <= {"_metadata"})
    value.__dict__.update(state)


def _restore_fields(value: Any, state: Any) -> None:
    value.__dict__.update(named_fields(state))


def _restore_index(value: Any, state: Any) -> None:
    """For a dict key: its fields are hashed."""
    require(type(state) is dict and all(type(one) in _INDEX_FIELDS.get(name, ()) for name, one in state.items()))
    require(all(is_key(one) for one in state.values()))
    value.__dict__.update(state)


def _restore_properties(value: Any, state: Any) -> None:
    require(type(state) is tuple and len(state) == 5 and type(state[3]) is type(_memory_format(0)))
    value.__setstate__(state)


def _rebuild_without_attributes(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return rebuild_from_type(function, kind, args, None)


def _rebuild_parameter_without_attributes(data: Any, requires_grad: Any, hooks: Any, state: Any) -> Any:
    return REBUILD["_rebuild_parameter"](data, requires_grad, hooks)


def _new(kind: Any) -> Callable[[], Any]:
    return lambda: kind.__new__(kind)


_INDEX_FIELDS = {"fqn": (str,), "offset": (torch.Size, type(None)), "index": (int, type(None))}
_FACTORIES = {kind.__name__: kind for kind in (list, dict, set, int, float, str, collections.OrderedDict)}
_ALIASES = {"__builtin__": "builtins", "numpy._core.multiarray": "numpy.core.multiarray"}  # Python 2, numpy 2
_CALLS: dict[str, dict[str, Callable[..., Any] | None]] = {
    "builtins": {
        "set": lambda values: set(_elements(values)), "frozenset": lambda values: frozenset(_elements(values)),
        "bytes": _bytes, "bytearray": _bytearray, "range": _range, "slice": _slice, "complex": _complex,
        **dict.fromkeys(("int", "float", "bool", "str", "list", "tuple", "dict")),
    },
    "_codecs": {"encode": _encode},
    "argparse": {"Namespace": _new(argparse.Namespace)},
    "collections": {"OrderedDict": _ordered_dict, "defaultdict": _defaultdict, "Counter": _counter},
    "numpy": {"ndarray": None, "dtype": NumpyDtype},
    "numpy.core.multiarray": {"_reconstruct": _reconstruct, "scalar": _scalar},
    "torch": {"Size": _size, "device": _device, "Tensor": None, **dict.fromkeys(STORAGES)},
    "torch.storage": {"UntypedStorage": None},
    "torch.nn.parameter": {"Parameter": None},
    "torch._utils": {**REBUILD},
    "torch._tensor": {"_rebuild_from_type_v2": rebuild_from_type},
    "torch.serialization": {"_get_layout": _layout},
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING": _memory_format},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING": _memory_format},  # until torch 2.2
}  # fmt: skip
# Created by `__new__`.
_NEW: dict[tuple[str, str], Callable[..., Any]] = {
    ("argparse", "Namespace"): _new(argparse.Namespace),
    ("torch.torch_version", "TorchVersion"): _torch_version,
}
_RECIPES = ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling", "Float8BlockScaling", "NVFP4BlockScaling",
            "MMParams", "QParams", "_FormatHelper", "_OverrideLinearPrecision")  # fmt: skip
_INERT: dict[type[Inert], dict[str, tuple[str, ...]]] = {
    InertDataclass: {
        "types": ("SimpleNamespace",),
        "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData"),
        "torch.distributed.checkpoint.filesystem": ("_StoragePrefix",),
        "megatron.core.dist_checkpointing.strategies.torch": ("MCoreSavePlan",),
        "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
        "megatron.core.rerun_state_machine": ("Call", "Caller"),
        "transformer_engine.common.recipe": _RECIPES,
    },
    InertEnum: {
        "signal": ("Signals",),
        "torch.distributed.checkpoint.planner": ("WriteItemType",),
        "megatron.core.enums": ("ModelType",),
        "megatron.core.transformer.enums": ("AttnBackend", "AttnMaskType", "AttnType", "CudaGraphScope", "LayerType"),
        "megatron.core.rerun_state_machine": (
            "RerunDiagnostic", "RerunMode", "RerunState", "RerunValidationStatus",
        ),
        "transformer_engine.common.recipe": ("Format",),
    },
    InertCall: {"datetime": ("timedelta",), "pathlib": ("PosixPath",), "pathlib._local": ("PosixPath",)},
    InertBytesIO: {"_io": ("BytesIO",)},
}  # fmt: skip
# Packages whose enums, dataclasses and functions appear in rank files, which only this kit reads.
_FOREIGN = (
    "megatron", "megatron_patch", "transformer_engine", "apex", "torch.distributed.checkpoint.planner",
    "torch.nn.functional", "torch._C._nn", "datetime", "pathlib", "signal",
)  # fmt: skip
_FOREIGN_PACKAGES = tuple(f"{package}." for package in _FOREIGN)
_FOREIGN_CALLS = {
    (module, name): Global(module, name, call) for module, name, call in (
        ("torch._tensor", "_rebuild_from_type_v2", _rebuild_without_attributes),
        ("torch._utils", "_rebuild_parameter_with_state", _rebuild_parameter_without_attributes),
    )
}  # fmt: skip
_KNOWN: dict[tuple[str, str], Any] = {
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{(module, name): Global(module, name, call, _NEW.get((module, name)))
       for module, calls in _CALLS.items() for name, call in calls.items()},
    **{(module, name): Global(module, name, None, new) for (module, name), new in _NEW.items()
       if name not in _CALLS.get(module, ())},
    **{(module, name): inert_class(kind, module, name)
       for kind, modules in _INERT.items() for module, names in modules.items() for name in names},
}  # fmt: skip
_KNOWN["builtins", "xrange"] = _KNOWN["builtins", "range"]  # Python 2's
# Python 3.10 pickles a member of this enum as a global of its own, later ones as a call of the enum with its value.
_KNOWN.update({("signal", one.name): _KNOWN["signal", "Signals"].call(int(one)) for one in signal.Signals})
# How the state of an instance is set, by its exact type.
RESTORE: dict[type, Callable[[Any, Any], None]] = {
    argparse.Namespace: _restore_fields,
    collections.OrderedDict: _restore_ordered_dict,
    numpy.ndarray: _restore_array,
    NumpyDtype: NumpyDtype.restore,
}
_KEYS: set[type] = set()  # classes whose instances may be dict keys, beside SCALARS
_DCP = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta")  # fmt: skip
_DCP_MODULES = (
    "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata", "megatron.core.dist_checkpointing.strategies.torch",
)  # fmt: skip


@cache
def _dcp_globals() -> dict[tuple[str, str], Global]:
    """The classes of a `.metadata` file; imported when a file names one: that takes as long as importing torch."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    metadata, filesystem, sharded_tensor, megatron = _DCP_MODULES
    classes = {
        **{(metadata, name): getattr(dcp, name) for name in _DCP if hasattr(dcp, name)},
        (filesystem, "_StorageInfo"): _StorageInfo,
        (sharded_tensor, "TensorProperties"): dcp.TensorProperties,
        # Megatron-Core 0.15's subclass of torch's, with one more field that no later version reads.
        (megatron, "MCoreMetadata"): dcp.Metadata,
    }
    RESTORE.update(dict.fromkeys(classes.values(), _restore_fields))
    RESTORE.update({dcp.MetadataIndex: _restore_index, dcp.TensorProperties: _restore_properties})
    _KEYS.add(dcp.MetadataIndex)
    return {key: Global(*key, None, _new(kind)) for key, kind in classes.items()}


def find_global(module: str, name: str, *, foreign: bool) -> Any:
    """The placeholder for `module`.`name`, of an enum's member its instance; None where it is not allowed.

    foreign: allow any name of Megatron and its libraries, for a pickle that only this kit reads.
    """
    key = _ALIASES.get(module, module), name
    found = _KNOWN.get(key)
    if found is None and module in _DCP_MODULES:
        found = _dcp_globals().get(key)
    if not foreign or isinstance(found, Inert) or type(found) is Global and key not in _FOREIGN_CALLS:
        return found
    if module in _FOREIGN or module.startswith(_FOREIGN_PACKAGES):
        return inert_class(Inert, module, name)
    return _FOREIGN_CALLS.get(key, found)
