"""Unpickling that runs no code of the file: known names are rebuilt, Megatron's become inert, others are refused."""

import argparse
import collections
import functools
import importlib
import pickle
from pathlib import Path
from typing import IO, Any

import torch

from common.errors import KitError

# Functions and classes that make tensors and plain values and do nothing else.
_TORCH_NAMES = {
    "torch._utils": (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
    ),
    "torch.serialization": ("_get_layout",),
    "torch.torch_version": ("TorchVersion",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),  # until torch 2.2
    "torch": ("Size", "device"),
}
# Megatron-Core 0.15's own subclass of torch's, with one more field that no later version reads.
_RENAMED = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): (
        "torch.distributed.checkpoint.metadata",
        "Metadata",
    ),
}
_NUMPY_NAMES = {"multiarray": ("_reconstruct", "scalar"), "numpy": ("ndarray", "dtype")}
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "Counter"): collections.Counter,
    ("argparse", "Namespace"): argparse.Namespace,
    **{(module, name): kind for module in ("builtins", "__builtin__") for name, kind in {
        "set": set, "frozenset": frozenset, "slice": slice, "range": range, "complex": complex, "bytearray": bytearray,
        "int": int, "float": float, "bool": bool, "str": str, "list": list, "tuple": tuple, "dict": dict,
        "bytes": bytes, "xrange": range,
    }.items()},
}  # fmt: skip
# Whose enums, dataclasses and functions stand in a checkpoint beside its tensors, as in Megatron-LM's arguments.
_INERT = (
    "megatron",
    "megatron_patch",
    "transformer_engine",
    "apex",
    "torch.distributed.checkpoint.planner",
    "torch.nn.functional",
    "torch._C._nn",
    "datetime",
    "pathlib",
    "signal",
)


class Inert:
    """Stands where a file names a class that is not wanted: keeps what it was made of, does nothing."""

    args: tuple[Any, ...] = ()  # of one that was made without a call, as dataclasses are

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.args}"


@functools.cache
def _inert_class(module: str, name: str) -> type[Inert]:
    return type(name, (Inert,), {"__module__": module})


def _encode(text: str, encoding: str) -> bytes:
    """`codecs.encode` for what pickle's protocol 2 uses it for: bytes as latin-1 text."""
    if encoding not in ("latin1", "latin-1"):
        raise KitError(f"a pickle asks to encode text as {encoding!r}: only latin1 is known")
    return text.encode("latin1")


def _rebuild_without_attributes(function: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`, less the Python attributes that a tensor bore."""
    return function(*args)


_OURS = {
    ("_codecs", "encode"): _encode,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_without_attributes,
    ("torch", "Tensor"): Inert,  # only ever the `kind` above
    ("torch.nn.parameter", "Parameter"): Inert,
    ("_io", "BytesIO"): Inert,  # Transformer Engine's `_extra_state`
}


class RestrictedUnpickler(pickle.Unpickler):
    """A pickle.Unpickler that refuses every global not listed above with a KitError naming it."""

    def __init__(self, stream: IO[bytes], source: Path) -> None:
        super().__init__(stream, encoding="utf-8")
        self.source = source

    def find_class(self, module: str, name: str) -> Any:
        """The object that `module`.`name` stands for here."""
        module, name = _RENAMED.get((module, name), (module, name))
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if (module, name) in _OURS:
            return _OURS[module, name]
        if name in _TORCH_NAMES.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage")):
                return found
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            return self._numpy(module, name)
        if module == "torch.storage" and name in ("UntypedStorage", "TypedStorage"):
            return getattr(torch.storage, name)
        if module.startswith(tuple(f"{package}." for package in _INERT)) or module in _INERT:
            return _inert_class(module, name)
        raise KitError(
            f"{self.source} asks for {module}.{name}, which loading weights does not need and which could run code:"
            " it was not loaded; take the file from a source you trust"
        )

    def _numpy(self, module: str, name: str) -> Any:
        known = _NUMPY_NAMES[module.rsplit(".", 1)[-1]]
        if name not in known:
            raise KitError(f"{self.source} asks for {module}.{name}, which is not allowed: it was not loaded")
        import numpy

        if module == "numpy":
            return getattr(numpy, name)
        package = "numpy._core" if hasattr(numpy, "_core") else "numpy.core"  # numpy 2 and 1.26, or before
        multiarray = importlib.import_module(f"{package}.multiarray")
        return getattr(multiarray, name)
