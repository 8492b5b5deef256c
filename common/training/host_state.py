"""The optimizer's float32 state in the host's memory, on the device for its part of a step: OPTIMIZER_STATE=cpu.

Of 18 bytes a parameter 6 are left on the device, the weights in bf16 and the gradients. Adam runs there all the same,
on as many parameters at a time as PART in optimizer.py says. Megatron-Core's own offload (HybridDeviceOptimizer) lets
the processor compute, and saves class names, which a checkpoint that is read without running code cannot hold.

A master weight keeps its tensor and gives away its storage between steps, as the flat parameters of torch's FSDP do
(torch/distributed/fsdp/_flat_param.py): Megatron-Core then asks for no more than its shape and device, and has its
values read, written and copied by this.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from common.errors import KitError
from common.platforms import available_memory

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostState:
    """Master weights and moments of one DistributedOptimizer, moved to the host as this is made."""

    def __init__(self, optimizer: Any) -> None:
        self.adam, self.places = optimizer.optimizer, optimizer.model_param_group_index_map
        pairs = zip(optimizer.shard_fp32_from_float16_groups, optimizer.shard_float16_groups, strict=True)
        # Each master weight with the part of the model's weights that is made from it; in float32 there are none.
        self.model_shards = {master: shard for group in pairs for master, shard in zip(*group, strict=True)}
        self.kept: dict[torch.Tensor, dict[str, torch.Tensor]] = {
            param: {} for group in self.adam.param_groups for param in group["params"]
        }
        self.on_gpu = any(param.is_cuda for param in self.kept)
        for master in self.model_shards:
            self._keep(master, "param", master)
            _free(master)
        self._synchronize()
        optimizer._copy_main_params_to_model_params = lambda: None  # done as a part of the step ends
        optimizer._copy_model_params_to_main_params = self.reload
        optimizer._get_main_param_and_optimizer_states = self.read
        optimizer._set_main_param_and_optimizer_states = self.write
        self.adam.load_state_dict = self._load_groups

    @contextmanager
    def on_device(self, params: list[torch.Tensor]) -> Iterator[None]:
        """The state of `params` is on the device within the block; the model has the new weights after it."""
        for param in params:
            self._bring(param)
        yield
        for param in params:
            self._take(param)
        self._synchronize()

    def _bring(self, param: torch.Tensor) -> None:
        kept, state = self.kept[param], self.adam.state[param]
        if param in self.model_shards:
            param.untyped_storage().resize_(param.numel() * param.element_size())
            param.data.copy_(kept["param"], non_blocking=True)
        for name in MOMENTS:
            if name in state:
                state[name] = torch.empty_like(kept[name], device=param.device).copy_(kept[name], non_blocking=True)

    def _take(self, param: torch.Tensor) -> None:
        kept, state = self.kept[param], self.adam.state[param]
        for name in MOMENTS:
            if name in state:  # not for a parameter without a gradient
                self._keep(param, name, state[name])
                state[name] = kept[name]
        if param in self.model_shards:
            self.model_shards[param].copy_(param.data)
            self._keep(param, "param", param)
            _free(param)

    def _keep(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        kept = self.kept[param]
        if name not in kept:
            kept[name] = _on_host(param)
        kept[name].copy_(value.detach(), non_blocking=True)

    def make_moments(self) -> None:
        """Zeros where Adam has made none yet, so that a checkpoint's can be loaded into them."""
        for param in self.kept:
            state = self.adam.state[param]
            for name in MOMENTS:
                if name not in state:
                    state[name] = self.kept[param][name] = _on_host(param).zero_()
            if isinstance(self.adam, (torch.optim.Adam, torch.optim.AdamW)):  # others count steps in their groups
                state.setdefault("step", torch.tensor(0.0))

    def reload(self, state_dict: Any = None) -> None:
        """Makes the master weights from the model's, as a run begins from weights alone."""
        assert state_dict is None
        for master, shard in self.model_shards.items():
            self._keep(master, "param", shard)
        self._synchronize()

    def read(self, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"param": master weights, "exp_avg": ..., "exp_avg_sq": ...}, on the host, of a parameter's shard here."""
        group, order = self.places[model_param]
        param = self.adam.param_groups[group]["params"][order]
        return {"param": self.kept[param].get("param", param), **self.adam.state[param]}

    def write(self, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Copies what `read` gives from `tensors`."""
        for name, place in self.read(model_param).items():
            if name in tensors:
                place.copy_(tensors[name])

    def _load_groups(self, state_dict: dict[str, Any]) -> None:
        """In the place of Adam's own, which would move all moments to the device; Megatron-Core passes what is here."""
        for group, given in zip(self.adam.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in given.items() if name != "params"})

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.current_stream().synchronize()


def check_host_memory(model: list[Any], shards: int) -> None:
    """Raises KitError where the node has too little memory for what its processes will keep there.

    A collective call, so that none has taken any yet. shards: the ranks that an optimizer's state is spread over.
    """
    params = [param for chunk in model for param in chunk.parameters()]
    own = sum((8 if param.dtype is torch.float32 else 12) * param.numel() for param in params) // shards
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = available_memory()
    dist.barrier()
    if processes * own > available:
        raise KitError(
            f"OPTIMIZER_STATE=cpu keeps {own / 2**30:.1f} GiB a process in the host's memory, for {processes} processes"
            f" here, and {available / 2**30:.1f} GiB are available: use more nodes, or set it to bf16 or fp32"
        )


@contextmanager
def gradients_away(model: list[Any]) -> Iterator[None]:
    """The memory of the gradients' buffers is free within the block: master weights are on the device while made."""
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


def _on_host(like: torch.Tensor) -> torch.Tensor:
    """Room for it in float32, pinned where it is on a device, so that copies run at the link's rate."""
    return torch.empty(like.shape, dtype=torch.float32, pin_memory=like.is_cuda)
