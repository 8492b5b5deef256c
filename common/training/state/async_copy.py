"""Copies between host and device that overlap with the device's computation."""

from collections.abc import Sequence

import torch

CopyPairs = Sequence[tuple[torch.Tensor, torch.Tensor]]  # (target, source)


class AsyncCopies:
    """Copies that may still be running. Keeps their tensors alive until one of its methods is called."""

    def __init__(self, pairs: CopyPairs, done: torch.cuda.Event | None) -> None:
        self.pairs, self.done = pairs, done

    def wait(self) -> None:
        """Makes later work of the current stream wait for the copies; does not block the host."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        self.pairs = ()

    def synchronize(self) -> None:
        """Blocks the host until the copies are done."""
        if self.done is not None:
            self.done.synchronize()
        self.pairs = ()


def copy_async(stream: torch.cuda.Stream | None, pairs: CopyPairs) -> AsyncCopies:
    """Starts the copies of `pairs` in `stream`, after the current stream's work so far; without a stream, copies now.

    Allocate device memory that is copied to before the call, and free what is copied from after `synchronize`, both in
    the current stream: its allocator does not know of `stream`.
    """
    if stream is None:
        for target, source in pairs:
            target.copy_(source)
        return AsyncCopies(pairs, None)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
    return AsyncCopies(pairs, stream.record_event())
