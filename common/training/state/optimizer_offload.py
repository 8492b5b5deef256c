"""The optimizer's float32 state in the host's memory, on the device for its part of a step: OPTIMIZER_STATE=cpu.

Of 18 bytes a parameter 6 are left on the device, the weights in bf16 and the gradients. Adam runs there all the same,
on as many parameters at a time as PART in optimizer.py says. Megatron-Core's own offload (HybridDeviceOptimizer) lets
the processor compute, and saves class names, which a checkpoint that is read without running code cannot hold.

A master weight keeps its tensor and gives away its storage between steps, as the flat parameters of torch's FSDP do
(torch/distributed/fsdp/_flat_param.py): Megatron-Core then asks for no more than its shape and device, and has its
values read, written and copied by this.
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
from common.training.state.transfers import Copies, copy_beside, host_buffer

MOMENTS = ("exp_avg", "exp_avg_sq")
FLOAT_BYTES = 4


class HostState:
    """Master weights and moments of one DistributedOptimizer, moved to the host as this is made.

    at_once: the state of so many parameters is on the device together, or that of one tensor that has more.
    """

    def __init__(self, optimizer: Any, at_once: int) -> None:
        self.adam, self.places = optimizer.optimizer, optimizer.model_param_group_index_map
        pairs = zip(optimizer.shard_fp32_from_float16_groups, optimizer.shard_float16_groups, strict=True)
        # Each master weight with the part of the model's weights that is made from it; in float32 there are none.
        self.model_shards = {master: shard for group in pairs for master, shard in zip(*group, strict=True)}
        self.at_once = at_once
        wanted = host_params(optimizer)
        self.on_gpu = any(param.is_cuda for param in wanted["exp_avg"])
        sizes = host_bytes(optimizer).items()
        self.buffers = {kind: host_buffer(size, pinned=self.on_gpu) for kind, size in sizes if size}
        self.room = {kind: _cut(self.buffers.get(kind), params) for kind, params in wanted.items()}
        self.bringing, self.taking = (torch.cuda.Stream() if self.on_gpu else None for _ in range(2))
        self._set_masters({master: master for master in self.model_shards})
        for master in self.model_shards:
            _free(master)
        optimizer._copy_main_params_to_model_params = lambda: None  # done as a part of the step ends
        optimizer._copy_model_params_to_main_params = self.reload
        optimizer._get_main_param_and_optimizer_states = self.read
        optimizer._set_main_param_and_optimizer_states = self.write
        self.adam.load_state_dict = self._load_groups

    def in_turn(self, parts: list[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
        """Each of `parts` with its state on the device. To be run to its end: only then is all of it on the host again.

        The next is brought while one computes and is taken back, unless both have more than `at_once` parameters; the
        model has the new weights of a part when the next one is given.
        """
        ahead: Copies | None = None
        going: tuple[list[torch.Tensor], Copies] | None = None
        for part, following in zip_longest(parts, parts[1:]):
            if going:
                self._leave(*going)
            here = ahead or self._bring(part)
            ahead = self._bring(following) if following and _numel(part + following) <= self.at_once else None
            here.come_first()
            yield part
            going = part, self._take(part)
        if going:
            self._leave(*going)

    def _bring(self, part: list[torch.Tensor]) -> Copies:
        pairs = []
        for param in part:
            state = self.adam.state[param]
            if param in self.model_shards:
                param.untyped_storage().resize_(FLOAT_BYTES * param.numel())
                pairs.append((param.data, self.room["param"][param]))
            for name in MOMENTS:
                if name in state:
                    state[name] = torch.empty_like(state[name], device=param.device)
                    pairs.append((state[name], self.room[name][param]))
        return copy_beside(self.bringing, pairs)

    def _take(self, part: list[torch.Tensor]) -> Copies:
        pairs = []
        for param in part:
            state = self.adam.state[param]
            for name in MOMENTS:
                if name in state:  # not for a parameter without a gradient
                    pairs.append((self.room[name][param], state[name]))
                    state[name] = self.room[name][param]
            if param in self.model_shards:
                self.model_shards[param].copy_(param.data)
                pairs.append((self.room["param"][param], param.data))
        return copy_beside(self.taking, pairs)

    def _leave(self, part: list[torch.Tensor], copies: Copies) -> None:
        """Frees what the device has of `part`, once the host has it."""
        copies.wait()
        for param in part:
            if param in self.model_shards:
                _free(param)

    def make_moments(self) -> None:
        """Zeros where Adam has made none yet, so that a checkpoint's can be loaded into them."""
        for param in self.room["exp_avg"]:
            state = self.adam.state[param]
            for name in MOMENTS:
                if name not in state:
                    state[name] = self.room[name][param].zero_()
            if isinstance(self.adam, (torch.optim.Adam, torch.optim.AdamW)):  # others count steps in their groups
                state.setdefault("step", torch.tensor(0.0))

    def reload(self, state_dict: Any = None) -> None:
        """Makes the master weights from the model's, as a run begins from weights alone."""
        assert state_dict is None
        self._set_masters(self.model_shards)

    def _set_masters(self, sources: dict[torch.Tensor, torch.Tensor]) -> None:
        pairs = [(self.room["param"][master], source.detach()) for master, source in sources.items()]
        copy_beside(self.taking, pairs).wait()

    def read(self, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"param": master weights, "exp_avg": ..., "exp_avg_sq": ...}, on the host, of a parameter's shard here."""
        group, order = self.places[model_param]
        param = self.adam.param_groups[group]["params"][order]
        return {"param": self.room["param"].get(param, param), **self.adam.state[param]}

    def write(self, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Copies what `read` gives from `tensors`."""
        for name, place in self.read(model_param).items():
            if name in tensors:
                place.copy_(tensors[name])

    def _load_groups(self, state_dict: dict[str, Any]) -> None:
        """In the place of Adam's own, which would move all moments to the device; Megatron-Core passes what is here."""
        for group, given in zip(self.adam.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in given.items() if name != "params"})


def host_params(optimizer: Any) -> dict[str, list[torch.Tensor]]:
    """What has each kind of state on the host: {"param": master weights, "exp_avg": all parameters, ...}, in order.

    The kinds are named as Megatron-Core names them. In float32 the model's weights are the master weights.
    """
    masters = {master for group in optimizer.shard_fp32_from_float16_groups for master in group}
    params = [param for group in optimizer.optimizer.param_groups for param in group["params"]]
    return {"param": [param for param in params if param in masters], **dict.fromkeys(MOMENTS, params)}


def host_bytes(optimizer: Any) -> dict[str, int]:
    """The bytes of each kind of state that HostState takes of the host's memory for this DistributedOptimizer."""
    return {kind: FLOAT_BYTES * _numel(params) for kind, params in host_params(optimizer).items()}


def check_host_memory(optimizers: list[Any]) -> None:
    """Ends the run where a node has too little memory for the state that its processes will keep there: KitError.

    A collective call, before any of them takes it. optimizers: this process's DistributedOptimizers.
    """
    node = int(os.environ.get("GROUP_RANK", "0"))  # torchrun's number of it
    own = sum(sum(host_bytes(optimizer).values()) for optimizer in optimizers)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (node, own, available_memory()))
    for node in sorted({number for number, _, _ in found}):
        needed = [own for number, own, _ in found if number == node]
        available = min(left for number, _, left in found if number == node)
        if sum(needed) > available:
            fail_together(
                f"OPTIMIZER_STATE=cpu keeps {sum(needed) / 2**30:.1f} GiB in the memory of node {node}, for"
                f" {len(needed)} processes, and {available / 2**30:.1f} GiB are available there: use more nodes, give"
                " the container or job more memory, or set OPTIMIZER_STATE to bf16 or fp32"
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


def _numel(params: list[torch.Tensor]) -> int:
    return sum(param.numel() for param in params)


def _cut(buffer: mmap.mmap | None, params: list[torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """For each of `params` a float32 tensor of its shape, in `buffer`, one after the other."""
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
