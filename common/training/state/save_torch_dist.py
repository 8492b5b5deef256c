"""A rank's part in saving torch_dist: its own share of the state into a file of its own, at once or in a thread.

Megatron-Core's strategies gather the optimizer's state to every data-parallel rank, and write it in forked processes
with a spawned manager (dist_checkpointing/strategies/filesystem_async.py). Here nothing is gathered, and what writes is
a thread of the rank: it holds nothing that the rank does not, and ends with it.
"""

import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.checkpoint.formats.torch_dist_writer import RankWriteResults, TensorShard, write_data_file
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.training.launching.hang_detector import Heartbeat
from common.training.state.shards import Part
from common.training.state.staging import HostCopy, blocks_of


@dataclass(frozen=True)
class Content:
    """What a rank writes, and what is written once for all of them."""

    parts: list[Part]
    objects: dict[str, Any]  # by Megatron-Core's keys of sharded objects
    common: dict[str, Any]


class ShareWriter:
    """Writes this rank's shares, one at a time; with `asynchronous`, in a thread from a copy of the state."""

    def __init__(self, heartbeat: Heartbeat, *, asynchronous: bool) -> None:
        self.heartbeat, self.asynchronous = heartbeat, asynchronous
        self.host = HostCopy()
        self._thread: threading.Thread | None = None
        self._preparing: threading.Thread | None = None
        self._share: RankWriteResults | None = None
        self._error: Exception | None = None

    def prepare(self, parts: list[Part]) -> None:
        """Begins to make the memory that `begin` copies `parts` to, in a thread."""
        tensors, device = [part.tensor for part in parts], torch.cuda.current_device()

        def make() -> None:
            try:
                torch.cuda.set_device(device)  # a thread begins on the first
                self.host.prepare(tensors)
            except Exception as error:  # raised by `begin`
                self._error = error

        self._preparing = threading.Thread(target=make, name="memory to save from", daemon=True)
        self._preparing.start()

    def begin(self, content: Content, folder: Path) -> None:
        """Begins to write to the existing `folder`; unless it is asynchronous, all is written, or OSError is raised."""
        if self._preparing:
            self._preparing.join()
            self._preparing = None
            if self._error:
                raise self._error
        self._share, self._error = None, None
        path = folder / f"__{dist.get_rank()}_0.distcp"
        objects = {key: _saved(value) for key, value in content.objects.items()}
        if not self.asynchronous:
            tensors = [part.tensor for part in content.parts]
            self._share = write_data_file(
                path, _blocks(content.parts), objects, blocks_of(tensors), lambda size: self.heartbeat.beat("saving")
            )
            return
        copies = self.host.copy([part.tensor for part in content.parts])
        blocks = _blocks(content.parts)  # of their places alone

        def write() -> None:
            try:
                self._share = write_data_file(path, blocks, objects, blocks_of(copies))
            except Exception as error:  # raised by `result`, in the thread that trains
                self._error = error

        self._thread = threading.Thread(target=write, name="saving", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank's share is written, or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> RankWriteResults:
        """What was written, when it is; raises what went wrong."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1)
            self.heartbeat.beat("waiting for a save to end")
        self._thread = None
        if self._error is not None:
            raise self._error
        assert self._share is not None
        return self._share


def _blocks(parts: list[Part]) -> list[TensorShard]:
    return [
        TensorShard(
            part.key, part.global_shape, part.place.offsets, LazyTensor(part.place.sizes, part.tensor.dtype, tuple)
        )
        for part in parts
    ]


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
