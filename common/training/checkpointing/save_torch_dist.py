"""Saving in torch_dist format: each rank writes its shards to its own file, synchronously or in a background thread.

Megatron-Core's strategies gather the optimizer's state on every data-parallel rank, and write it in forked processes
with a spawned manager (dist_checkpointing/strategies/filesystem_async.py). Here nothing is gathered, and a thread of
the rank writes: it holds nothing that the rank does not, and ends with it.
"""

import io
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.checkpoint.formats.torch_dist_writer import RankWriteResults, TensorShard, write_data_file
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.training.checkpointing.shards import StateShard
from common.training.checkpointing.staging import StagingBuffer, iter_blocks
from common.training.checkpointing.state_dict import RankStateDict
from common.training.launching.hang_detector import Heartbeat


class TorchDistWriter:
    """Writes this rank's files, one at a time; with `async_save`, in a thread from a staged copy of the state."""

    def __init__(self, heartbeat: Heartbeat, *, async_save: bool) -> None:
        self.heartbeat, self.async_save = heartbeat, async_save
        self.staging = StagingBuffer()
        self._thread: threading.Thread | None = None
        self._allocation: threading.Thread | None = None
        self._results: RankWriteResults | None = None
        self._error: Exception | None = None

    def allocate_staging(self, shards: list[StateShard]) -> None:
        """Starts to allocate, in a thread, the memory that `write` stages `shards` in."""
        tensors, device = [shard.tensor for shard in shards], torch.cuda.current_device()

        def allocate() -> None:
            try:
                torch.cuda.set_device(device)  # a new thread is on device 0
                self.staging.allocate(tensors)
            except Exception as error:  # raised by `write`
                self._error = error

        self._allocation = threading.Thread(target=allocate, name="staging memory", daemon=True)
        self._allocation.start()

    def write(self, state_dict: RankStateDict, folder: Path) -> None:
        """Writes to the existing `folder`, or, with `async_save`, starts to; raises OSError when the disk refuses."""
        if self._allocation:
            self._allocation.join()
            self._allocation = None
            if self._error:
                raise self._error
        self._results, self._error = None, None
        path = folder / f"__{dist.get_rank()}_0.distcp"
        objects = {key: _serialize(value) for key, value in state_dict.objects.items()}
        tensors = [shard.tensor for shard in state_dict.shards]
        if not self.async_save:
            self._results = write_data_file(
                path, _tensor_shards(state_dict.shards), objects, iter_blocks(tensors),
                lambda size: self.heartbeat.beat("saving"),
            )  # fmt: skip
            return
        copies = self.staging.stage(tensors)
        tensor_shards = _tensor_shards(state_dict.shards)  # without the tensors themselves

        def write() -> None:
            try:
                self._results = write_data_file(path, tensor_shards, objects, iter_blocks(copies))
            except Exception as error:  # raised by `result`, in the training thread
                self._error = error

        self._thread = threading.Thread(target=write, name="saving", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank's file is written, or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> RankWriteResults:
        """What was written; blocks until the file is complete, and raises the error of its thread."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1)
            self.heartbeat.beat("waiting for the pending save")
        self._thread = None
        if self._error is not None:
            raise self._error
        assert self._results is not None
        return self._results


def _tensor_shards(shards: list[StateShard]) -> list[TensorShard]:
    return [
        TensorShard(
            each.key, each.global_shape, each.place.offsets, LazyTensor(each.place.sizes, each.tensor.dtype, tuple)
        )
        for each in shards
    ]


def _serialize(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
