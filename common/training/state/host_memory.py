"""Large buffers of host memory, pinned where a device copies to or from them."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from common.errors import KitError
from common.log import logger

CUDA_HOST_REGISTER_PORTABLE = 1  # of cuda_runtime_api.h: pinned for every context
PAGE = 4096
BLOCK_BYTES = 64 << 20  # that a thread faults in at once: torch writes fewer than 32,768 elements in one thread
MAX_THREADS = 16
ASYNC_SAVE = ("ASYNC_SAVE=true", "use more nodes, or ASYNC_SAVE=false")


def host_buffer(size: int, setting: str, remedy: str, *, pinned: bool) -> torch.Tensor:
    """[size] uint8, zeros, for `setting`; raises KitError, with `remedy`, if the host does not have them.

    Exactly `size`: torch's pin_memory rounds each tensor up to a power of two (ATen/core/CachingHostAllocator.h).
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise KitError(f"{setting}: no {size / 2**30:.1f} GiB of memory ({error.strerror}): {remedy}") from error
    # Huge pages: a page fault for every 4 KiB takes longer than a copy of them, and so does pinning page by page.
    _advise(memory, "MADV_HUGEPAGE")
    # Not in forked processes: a fork would copy pinned pages or, in older kernels, share them until one side writes,
    # and leave the device writing to pages that no longer belong to this process.
    _advise(memory, "MADV_DONTFORK")
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    _fault_in(buffer)
    if pinned:
        _pin(buffer, setting, remedy)
    return buffer


def _advise(memory: mmap.mmap, advice: str) -> None:
    """Gives the kernel `advice`, which a kernel or Python that does not know it does without."""
    try:
        memory.madvise(getattr(mmap, advice))
    except (AttributeError, OSError) as error:
        logger.debug("%s: %s", advice, error)


def _fault_in(buffer: torch.Tensor) -> None:
    """Writes to every page of `buffer`, by several threads: pinning would fault them in by one, and block the device.

    A page is zeroed by the kernel; one byte of it is written.
    """
    with ThreadPoolExecutor(num_threads()) as threads:
        for _ in threads.map(lambda block: block[::PAGE].zero_(), buffer.split(BLOCK_BYTES)):
            pass


def num_threads() -> int:
    """This rank's share of the processors that it may run on."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // ranks))


def _pin(buffer: torch.Tensor, setting: str, remedy: str) -> None:
    """Pins `buffer` for every device until this process ends; raises KitError if CUDA refuses.

    In one call: a copy that crosses from one registered range to the next is an invalid argument.
    """
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, CUDA_HOST_REGISTER_PORTABLE)
    if int(code):
        raise KitError(
            f"{setting}: CUDA does not pin {buffer.nbytes / 2**30:.1f} GiB of the host's memory"
            f" ({cudart.cudaGetErrorString(code)}): start the container with --ulimit memlock=-1, {remedy}"
        )
