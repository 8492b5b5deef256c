"""Copies between the host's memory and a device's that run beside what the device computes."""

import mmap
from collections.abc import Sequence

import torch

from common.errors import KitError

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]  # target, source
PORTABLE = 1  # cudaHostRegisterPortable of cuda_runtime_api.h: pinned for every context


class Copies:
    """Copies that may be under way. What they copy from and to is kept alive until one of the methods was called."""

    def __init__(self, pairs: Pairs, done: torch.cuda.Event | None) -> None:
        self.pairs, self.done = pairs, done

    def come_first(self) -> None:
        """Has what is asked of the device from now on begin after them; they are not waited for here."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        self.pairs = ()

    def wait(self) -> None:
        """Returns when they are done."""
        if self.done is not None:
            self.done.synchronize()
        self.pairs = ()


def copy_beside(stream: torch.cuda.Stream | None, pairs: Pairs) -> Copies:
    """The copies of `pairs` in `stream`, begun after what was asked of the device so far; without one they are done.

    Memory of the device that is copied to is to be allocated before, and what is copied from freed after `wait`, both
    in the current stream: its allocator knows nothing of `stream`.
    """
    if stream is None:
        for target, source in pairs:
            target.copy_(source)
        return Copies(pairs, None)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
    return Copies(pairs, stream.record_event())


def host_buffer(size: int, *, pinned: bool) -> mmap.mmap:
    """`size` bytes of zeros; pinned: locked in memory, so that devices read and write it at the link's rate. KitError.

    Exactly as many: torch's pin_memory rounds each tensor's up to a power of two (ATen/core/CachingHostAllocator.h).
    Shared with what is forked: of private memory that is pinned a fork would copy all, or, in older kernels, leave the
    device writing to pages that are no longer this process's.
    """
    way_out = "use more nodes, or set OPTIMIZER_STATE to bf16 or fp32"
    try:
        buffer = mmap.mmap(-1, size)
    except OSError as error:
        raise KitError(
            f"OPTIMIZER_STATE=cpu: no {size / 2**30:.1f} GiB of memory ({error.strerror}): {way_out}"
        ) from error
    if pinned:
        pin(torch.frombuffer(buffer, dtype=torch.uint8), "OPTIMIZER_STATE=cpu", way_out)
    return buffer


def pin(buffer: torch.Tensor, setting: str, way_out: str) -> None:
    """Locks `buffer` in memory for every device, for as long as this process lives; raises KitError."""
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, PORTABLE)
    if int(code):
        raise KitError(
            f"{setting}: CUDA does not pin {buffer.nbytes / 2**30:.1f} GiB of the host's memory"
            f" ({cudart.cudaGetErrorString(code)}): start the container with --ulimit memlock=-1, {way_out}"
        )
