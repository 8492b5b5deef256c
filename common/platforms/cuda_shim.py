"""A stand-in for `torch.cuda` on a machine without a GPU, so that Megatron-Core runs there unchanged.

Megatron-Core writes "cuda" as a literal device, asks `torch.cuda` for the current device, streams and random state, and
compares `Tensor.type()` with CUDA's names. Each of these is answered here with the CPU's own.
"""

import contextlib
import importlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# torch._dynamo asks that torch.cuda.Stream have this base; torch 2.1 asks for none.
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
        """The result of `func` with the device "cuda" made "cpu"."""
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to:
            args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        result = func(*args, **(kwargs or {}))
        # Megatron-Core's optimizer sorts parameters by type() in {"torch.cuda.FloatTensor", ...}.
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class Stream(StreamBase):
    """A stream that does its work at once."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stream":
        """A stream of the CPU, whatever device is asked for."""
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
        """The event, which is over already."""
        return event

    def query(self) -> bool:
        """Whether the work is done: it is."""
        return True

    def synchronize(self) -> None:
        """Returns at once: there is nothing to wait for."""


def _answer(value: Any) -> Any:
    """A new function that takes anything and returns `value` (torch._dynamo wants each name its own function)."""
    return lambda *args, **kwargs: value


def _set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def install() -> None:
    """Puts the stand-in in place for this process; to be called before Megatron-Core is imported."""
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
    """Random state by the CPU's generator, and no torch.compile: minutes of it would be won back by nobody."""
    import megatron.core.jit as jit

    jit.jit_fuser = lambda function: function
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = _set_state
