"""A shim for `torch.cuda` on a machine without a GPU, with which Megatron-Core runs unmodified.

Megatron-Core passes "cuda" as a literal device, queries `torch.cuda` for the current device, streams and random state,
and compares `Tensor.type()` with CUDA's names. The shim maps each of these to the CPU.
"""

import contextlib
import importlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# torch._dynamo requires that torch.cuda.Stream has this base class; torch 2.1 requires none.
if TORCH >= (2, 6):
    StreamBase: Any = torch.Stream
else:
    StreamBase = importlib.import_module("torch._streambase")._StreamBase if TORCH >= (2, 3) else object


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CudaMeansCpu(TorchFunctionMode):
    """Sends every torch call that names a CUDA device to the CPU, and gives CPU tensors CUDA's type names."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of `func`, with "cpu" in place of the device "cuda"."""
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs and kwargs.get("pin_memory"):  # without a device there is no pinned memory
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to:
            args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        result = func(*args, **(kwargs or {}))
        # Megatron-Core's optimizer sorts parameters by type() in {"torch.cuda.FloatTensor", ...}.
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class Stream(StreamBase):
    """A stream whose work is always complete: the CPU runs it synchronously."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stream":
        """A stream of the CPU, whatever device is requested."""
        return super().__new__(cls, **({"device": CPU} if issubclass(cls, torch.Stream) else {}))

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def wait_stream(self, stream: Any) -> None:
        """Returns at once: there is nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Returns at once: there is nothing to wait for."""

    def record_event(self, event: Any = None) -> Any:
        """`event`, which is complete."""
        return event

    def query(self) -> bool:
        """True: the work is complete."""
        return True

    def synchronize(self) -> None:
        """Returns at once: there is nothing to wait for."""


def _answer(value: Any) -> Any:
    """A new function that takes anything and returns `value` (torch._dynamo wants each name its own function)."""
    return lambda *args, **kwargs: value


def _set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def install() -> None:
    """Installs the shim in this process; to be called before Megatron-Core is used."""
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)
        module.manual_seed = lambda seed: torch.manual_seed(seed)
        module.manual_seed_all = _answer(None)  # torch.manual_seed calls it
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, _answer(None))
    stream = Stream()
    cuda.Stream = Stream
    cuda.current_device, cuda.current_stream, cuda.default_stream = _answer(CPU), _answer(stream), _answer(stream)
    cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    CudaMeansCpu().__enter__()
    _prepare_megatron()


def _prepare_megatron() -> None:
    """Uses the CPU's random number generator, and no torch.compile, which takes minutes and gains nothing here."""
    import megatron.core.jit as jit

    jit.jit_fuser = lambda function: function
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = _set_state
