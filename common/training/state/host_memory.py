"""Large buffers of host memory, pinned where a device copies to or from them."""

import mmap

import torch

from common.errors import KitError

CUDA_HOST_REGISTER_PORTABLE = 1  # of cuda_runtime_api.h: pinned for every context


def offload_buffer(size: int, *, pinned: bool) -> mmap.mmap:
    """`size` bytes of zeros for OPTIMIZER_STATE=cpu; raises KitError if the host does not have them.

    Exactly `size`: torch's pin_memory rounds each tensor up to a power of two (ATen/core/CachingHostAllocator.h).
    Shared with forked processes: a fork would copy private pinned memory or, in older kernels, leave the device writing
    to pages that no longer belong to this process.
    """
    remedy = "use more nodes, or set OPTIMIZER_STATE to bf16 or fp32"
    try:
        buffer = mmap.mmap(-1, size)
    except OSError as error:
        raise _no_memory("OPTIMIZER_STATE=cpu", size, error, remedy) from error
    if pinned:
        pin_memory(torch.frombuffer(buffer, dtype=torch.uint8), "OPTIMIZER_STATE=cpu", remedy)
    return buffer


def staging_buffer(size: int, *, pinned: bool) -> torch.Tensor:
    """[size] uint8 for ASYNC_SAVE, in huge pages; raises KitError if the host does not have them."""
    remedy = "use more nodes, or ASYNC_SAVE=false"
    try:
        # Huge pages: a page fault for every 4 KiB of a copy takes longer than the copy.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise _no_memory("ASYNC_SAVE=true", size, error, remedy) from error
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    for chunk in buffer.split(1 << 30):
        chunk.zero_()  # faults the pages in before they are pinned, which blocks the device
    if pinned:
        pin_memory(buffer, "ASYNC_SAVE=true", remedy)
    return buffer


def pin_memory(buffer: torch.Tensor, setting: str, remedy: str) -> None:
    """Pins `buffer` for every device until this process ends; raises KitError if CUDA refuses."""
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, CUDA_HOST_REGISTER_PORTABLE)
    if int(code):
        raise KitError(
            f"{setting}: CUDA does not pin {buffer.nbytes / 2**30:.1f} GiB of the host's memory"
            f" ({cudart.cudaGetErrorString(code)}): start the container with --ulimit memlock=-1, {remedy}"
        )


def _no_memory(setting: str, size: int, error: OSError, remedy: str) -> KitError:
    return KitError(f"{setting}: no {size / 2**30:.1f} GiB of memory ({error.strerror}): {remedy}")
