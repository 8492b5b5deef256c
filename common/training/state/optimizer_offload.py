"""OPTIMIZER_STATE=cpu: optimizer CPU offload. The float32 state is in host memory, and on the device during its update.

Of 18 bytes a parameter, 6 remain on the device: bf16 weights and float32 gradients. Adam still runs on the device, on
as many parameters at a time as PART in optimizer.py. Megatron-Core's own offload (HybridDeviceOptimizer) runs Adam on
the CPU, and saves class names, which a checkpoint that loads without running code cannot hold.

Between steps a master weight keeps its tensor but frees its storage, as the flat parameters of torch's FSDP do
(torch/distributed/fsdp/_flat_param.py). Megatron-Core then uses only its shape and device; OffloadedState reads, writes
and copies its values.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from common.platforms import available_memory
from common.training.launching.process_group import fail_together
from common.training.state.async_copy import AsyncCopies, copy_async
from common.training.state.host_memory import offload_buffer

MOMENTS = ("exp_avg", "exp_avg_sq")
FLOAT_BYTES = 4


class OffloadedState:
    """Master weights and moments of one DistributedOptimizer, moved to host memory by the constructor.

    max_params: how many parameters' state is on the device at once; a single larger tensor's is too.
    """

    def __init__(self, optimizer: Any, max_params: int) -> None:
        self.adam, self.group_index_map = optimizer.optimizer, optimizer.model_param_group_index_map
        pairs = zip(optimizer.shard_fp32_from_float16_groups, optimizer.shard_float16_groups, strict=True)
        # Each master weight with its shard of the model's weights; empty in float32.
        self.model_shards = {master: shard for group in pairs for master, shard in zip(*group, strict=True)}
        self.max_params = max_params
        params = offloaded_params(optimizer)
        on_gpu = any(param.is_cuda for param in params["exp_avg"])
        sizes = offloaded_bytes(optimizer).items()
        self.buffers = {kind: offload_buffer(size, pinned=on_gpu) for kind, size in sizes if size}
        self.host = {kind: _host_tensors(self.buffers.get(kind), each) for kind, each in params.items()}
        self.h2d_stream, self.d2h_stream = (torch.cuda.Stream() if on_gpu else None for _ in range(2))
        self._set_masters({master: master for master in self.model_shards})
        for master in self.model_shards:
            _free(master)
        optimizer._copy_main_params_to_model_params = lambda: None  # done after the update of each part
        optimizer._copy_model_params_to_main_params = self.reload
        optimizer._get_main_param_and_optimizer_states = self.read
        optimizer._set_main_param_and_optimizer_states = self.write
        self.adam.load_state_dict = self._load_param_groups

    def on_device(self, parts: list[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
        """Each of `parts` with its state on the device. Exhaust it: all state is back on the host only at its end.

        The next part is prefetched during the update and write-back of the current one, unless both exceed
        `max_params`. The model has a part's new weights when the next part is yielded.
        """
        prefetched: AsyncCopies | None = None
        pending: tuple[list[torch.Tensor], AsyncCopies] | None = None
        for part, following in zip_longest(parts, parts[1:]):
            if pending:
                self._finish_write_back(*pending)
            current = prefetched or self._fetch(part)
            prefetched = None
            if following and _numel(part + following) <= self.max_params:
                prefetched = self._fetch(following)
            current.wait()
            yield part
            pending = part, self._write_back(part)
        if pending:
            self._finish_write_back(*pending)

    def _fetch(self, part: list[torch.Tensor]) -> AsyncCopies:
        pairs = []
        for param in part:
            state = self.adam.state[param]
            if param in self.model_shards:
                param.untyped_storage().resize_(FLOAT_BYTES * param.numel())
                pairs.append((param.data, self.host["param"][param]))
            for name in MOMENTS:
                if name in state:
                    state[name] = torch.empty_like(state[name], device=param.device)
                    pairs.append((state[name], self.host[name][param]))
        return copy_async(self.h2d_stream, pairs)

    def _write_back(self, part: list[torch.Tensor]) -> AsyncCopies:
        pairs = []
        for param in part:
            state = self.adam.state[param]
            for name in MOMENTS:
                if name in state:  # not for a parameter without a gradient
                    pairs.append((self.host[name][param], state[name]))
                    state[name] = self.host[name][param]
            if param in self.model_shards:
                self.model_shards[param].copy_(param.data)
                pairs.append((self.host["param"][param], param.data))
        return copy_async(self.d2h_stream, pairs)

    def _finish_write_back(self, part: list[torch.Tensor], copies: AsyncCopies) -> None:
        """Frees the device memory of `part` when its copies are done."""
        copies.synchronize()
        for param in part:
            if param in self.model_shards:
                _free(param)

    def initialize_moments(self) -> None:
        """Adds zeros where Adam has no moments yet, so that a checkpoint's can be loaded into them."""
        for param in self.host["exp_avg"]:
            state = self.adam.state[param]
            for name in MOMENTS:
                if name not in state:
                    state[name] = self.host[name][param].zero_()
            if isinstance(self.adam, (torch.optim.Adam, torch.optim.AdamW)):  # others count steps in their groups
                state.setdefault("step", torch.tensor(0.0))

    def reload(self, state_dict: Any = None) -> None:
        """Copies the model's weights to the master weights, for a run that starts from weights only."""
        assert state_dict is None
        self._set_masters(self.model_shards)

    def _set_masters(self, sources: dict[torch.Tensor, torch.Tensor]) -> None:
        pairs = [(self.host["param"][master], source.detach()) for master, source in sources.items()]
        copy_async(self.d2h_stream, pairs).synchronize()

    def read(self, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"param": master weights, "exp_avg": ..., "exp_avg_sq": ...} of this rank's shard, on the host."""
        group, order = self.group_index_map[model_param]
        param = self.adam.param_groups[group]["params"][order]
        return {"param": self.host["param"].get(param, param), **self.adam.state[param]}

    def write(self, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Copies `tensors` into what `read` returns."""
        for name, tensor in self.read(model_param).items():
            if name in tensors:
                tensor.copy_(tensors[name])

    def _load_param_groups(self, state_dict: dict[str, Any]) -> None:
        """Replaces Adam's load_state_dict, which would move all moments to the device; they are in place already."""
        for group, saved in zip(self.adam.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def offloaded_params(optimizer: Any) -> dict[str, list[torch.Tensor]]:
    """The parameters with each kind of offloaded state: {"param": master weights, "exp_avg": all, ...}, in order.

    The kinds have Megatron-Core's names. In float32 the model's weights are the master weights.
    """
    masters = {master for group in optimizer.shard_fp32_from_float16_groups for master in group}
    params = [param for group in optimizer.optimizer.param_groups for param in group["params"]]
    return {"param": [param for param in params if param in masters], **dict.fromkeys(MOMENTS, params)}


def offloaded_bytes(optimizer: Any) -> dict[str, int]:
    """The host memory that OffloadedState allocates for each kind of state of this DistributedOptimizer."""
    return {kind: FLOAT_BYTES * _numel(params) for kind, params in offloaded_params(optimizer).items()}


def check_host_memory(optimizers: list[Any]) -> None:
    """Raises KitError where a node has too little memory for the offloaded state of its processes.

    A collective call, before anything is allocated. optimizers: this process's DistributedOptimizers.
    """
    node = int(os.environ.get("GROUP_RANK", "0"))  # set by torchrun
    size = sum(sum(offloaded_bytes(optimizer).values()) for optimizer in optimizers)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (node, size, available_memory()))
    for node in sorted({number for number, _, _ in ranks}):
        needed = [size for number, size, _ in ranks if number == node]
        available = min(free for number, _, free in ranks if number == node)
        if sum(needed) > available:
            fail_together(
                f"OPTIMIZER_STATE=cpu keeps {sum(needed) / 2**30:.1f} GiB in the memory of node {node}, for"
                f" {len(needed)} processes, and {available / 2**30:.1f} GiB are available there: use more nodes, give"
                " the container or job more memory, or set OPTIMIZER_STATE to bf16 or fp32"
            )


@contextmanager
def released_gradients(model: list[Any]) -> Iterator[None]:
    """Frees the gradient buffers within the block, since master weights are built on the device."""
    storages = [buffer.grad_data.untyped_storage() for chunk in model for buffer in chunk.buffers]
    sizes = [storage.nbytes() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    yield
    for storage, size in zip(storages, sizes, strict=True):
        storage.resize_(size)
    for chunk in model:
        chunk.zero_grad_buffer()


def _free(param: torch.Tensor) -> None:
    param.untyped_storage().resize_(0)


def _numel(params: list[torch.Tensor]) -> int:
    return sum(param.numel() for param in params)


def _host_tensors(buffer: mmap.mmap | None, params: list[torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """A float32 tensor in `buffer` for each of `params`, of its shape, one after the other."""
    tensors, offset = {}, 0
    for param in params:
        count = param.numel()
        if buffer is None or not count:
            tensors[param] = torch.empty(param.shape, dtype=torch.float32)
        else:
            flat = torch.frombuffer(buffer, dtype=torch.float32, count=count, offset=offset)
            tensors[param] = flat.view(param.shape)
        offset += FLOAT_BYTES * count
    return tensors
