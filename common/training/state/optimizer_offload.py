"""OPTIMIZER_STATE=cpu, cpu_bf16: optimizer CPU offload. The state is in host memory, and on the device for its update.

Of 18 bytes a parameter, 6 remain on the device: bf16 weights and float32 gradients. On the host are 12, float32 master
weights and moments, or, with cpu_bf16, 6: moments in bf16, and of the master weights what the weights lack
(master_weights.py). Adam still runs on the device in float32, on one part of the parameters at a time. Megatron-Core's
own offload (HybridDeviceOptimizer) runs Adam on the CPU, and saves class names, which a checkpoint that loads without
running code cannot hold.

The master weights' own tensors free their storage, as the flat parameters of torch's FSDP do
(torch/distributed/fsdp/_flat_param.py). Megatron-Core then uses only their shapes, device and gradients.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from common.engine.optimizer import adam_param
from common.training.state.async_copy import AsyncCopies, copy_async
from common.training.state.master_weights import MasterWeights, merge, split
from common.training.state.offload_memory import MOMENTS, Kinds, allocate, offloaded_params, offloaded_types

OFFLOADED_PART = 1 << 26  # parameters: a copy of it takes milliseconds, and starting one microseconds


@dataclass(frozen=True)
class Piece:
    """The elements [start, stop) of a parameter, the first of them at `at` in its part."""

    param: torch.Tensor
    start: int
    stop: int
    at: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece of what belongs to the parameter, such as its gradient."""
        return tensor[self.start : self.stop]

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece of what belongs to its part."""
        return tensor[self.at : self.at + self.stop - self.start]


class OffloadedState:
    """Master weights and moments of one DistributedOptimizer, moved to host memory by the constructor.

    kind: the OPTIMIZER_STATE. part: how many parameters are updated at once; the state of three such parts is on the
    device: the next one comes, one is updated, and the last one goes.
    """

    def __init__(self, optimizer: Any, kind: str, part: int = OFFLOADED_PART) -> None:
        self.optimizer, self.adam = optimizer, optimizer.optimizer
        pairs = zip(optimizer.shard_fp32_from_float16_groups, optimizer.shard_float16_groups, strict=True)
        # Each master weight with its shard of the model's weights; empty in float32.
        self.model_shards = {master: shard for group in pairs for master, shard in zip(*group, strict=True)}
        self.part, params = part, offloaded_params(optimizer)
        assert not self.model_shards or len(self.model_shards) == len(params), "some parameters have no master weights"
        self.flat, self.host = allocate(optimizer, kind)
        self.keeps_remainders = offloaded_types(optimizer, kind).get("param") == torch.int16
        ends = itertools.accumulate((param.numel() for param in params), initial=0)
        self.place = dict(zip(params, ends, strict=False))  # of a parameter in `flat`
        on_gpu = any(param.is_cuda for param in params)
        self.h2d_stream, self.d2h_stream = (torch.cuda.Stream() if on_gpu else None for _ in range(2))
        if not self.keeps_remainders:  # which are zeros already
            self.reload()
        for master in self.model_shards:
            master.untyped_storage().resize_(0)
        optimizer.offloaded_state = self
        optimizer._copy_main_params_to_model_params = lambda: None  # done after the update of each part
        optimizer._copy_model_params_to_main_params = self.reload
        optimizer._get_main_param_and_optimizer_states = self.read
        optimizer._set_main_param_and_optimizer_states = self.write
        self.adam.load_state_dict = self._load_param_groups

    def on_device(self, params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """A part of `params` at a time, cut into float32 tensors with gradients and Adam's state, on the device.

        Exhaust it: the state is back on the host only at its end. The next part is fetched and the last one is written
        back during an update; the model has a part's new weights when the next one is yielded.
        """
        self.initialize_moments()
        parts = cut(params, self.part)
        fetched: tuple[Kinds, AsyncCopies] | None = None
        written: deque[AsyncCopies] = deque()
        for part, following in itertools.zip_longest(parts, parts[1:]):
            if len(written) == 2:
                written.popleft().wait()  # and frees what was copied
            state, copies = fetched or self._fetch(part)
            fetched = self._fetch(following) if following else None
            copies.wait()
            state = self._in_float32(part, state)
            pieces = self._pieces(part, state)
            yield pieces
            self._keep_steps(part, pieces)
            written.append(self._write_back(part, pieces, state))
            del state, pieces, copies
        for copies in written:
            copies.synchronize()

    def _flat_part(self, part: list[Piece]) -> Kinds:
        """The part of each kind on the host."""
        first, last = part[0], part[-1]
        begin = self.place[first.param] + first.start
        return {kind: tensor[begin : begin + last.at + last.stop - last.start] for kind, tensor in self.flat.items()}

    def _fetch(self, part: list[Piece]) -> tuple[Kinds, AsyncCopies]:
        source, device = self._flat_part(part), part[0].param.device
        state = {kind: torch.empty_like(tensor, device=device) for kind, tensor in source.items()}
        return state, copy_async(self.h2d_stream, [(state[kind], source[kind]) for kind in source])

    def _in_float32(self, part: list[Piece], state: Kinds) -> Kinds:
        if not self.keeps_remainders:
            return state
        masters = [merge(piece.of(self.model_shards[piece.param]), piece.within(state["param"])) for piece in part]
        return {"param": torch.cat(masters), **{name: state[name].float() for name in MOMENTS}}

    def _pieces(self, part: list[Piece], state: Kinds) -> list[torch.Tensor]:
        pieces = []
        for piece in part:
            tensor = piece.within(state["param"]) if "param" in state else piece.of(piece.param.detach())
            if piece.param.grad is not None:
                tensor.grad = piece.of(piece.param.grad)
            own = self.adam.state[tensor] = {name: piece.within(state[name]) for name in MOMENTS}
            if "step" in self.adam.state[piece.param]:
                own["step"] = self.adam.state[piece.param]["step"].clone()
            pieces.append(tensor)
        return pieces

    def _keep_steps(self, part: list[Piece], pieces: list[torch.Tensor]) -> None:
        """Takes Adam's state of `pieces` from it; a parameter has made a step when its last piece has."""
        for piece, tensor in zip(part, pieces, strict=True):
            own = self.adam.state.pop(tensor)
            if "step" in own and piece.stop == piece.param.numel():
                self.adam.state[piece.param]["step"] = own["step"]

    def _write_back(self, part: list[Piece], pieces: list[torch.Tensor], state: Kinds) -> AsyncCopies:
        """Starts to copy the state of a part to the host, and copies its weights to the model's."""
        target = self._flat_part(part)
        if self.keeps_remainders:
            rounded = {name: state[name].to(target[name].dtype) for name in MOMENTS}
            state = {"param": torch.empty_like(target["param"], device=state["param"].device), **rounded}
        for piece, master in zip(part, pieces, strict=True):
            if self.keeps_remainders:
                weight, remainder = split(master)
                piece.of(self.model_shards[piece.param]).copy_(weight)
                piece.within(state["param"]).copy_(remainder)
            elif "param" in state:
                piece.of(self.model_shards[piece.param]).copy_(master)
        return copy_async(self.d2h_stream, [(target[kind], state[kind]) for kind in target])

    def initialize_moments(self) -> None:
        """Gives Adam zeros where it has no moments yet, as it would itself, or a checkpoint to load into."""
        for param in self.host["exp_avg"]:
            state = self.adam.state[param]
            for name in MOMENTS:
                state.setdefault(name, self.host[name][param])
            if isinstance(self.adam, (torch.optim.Adam, torch.optim.AdamW)):  # others count steps in their groups
                state.setdefault("step", torch.tensor(0.0))

    def reload(self, state_dict: Any = None) -> None:
        """Makes the model's weights the master weights, for a run that starts from weights only."""
        assert state_dict is None
        if self.keeps_remainders:
            self.flat["param"].zero_()
            return
        pairs = [(self.host["param"][master], shard) for master, shard in self.model_shards.items()]
        copy_async(self.d2h_stream, pairs).synchronize()

    def state_of(self, model_param: torch.Tensor) -> dict[str, torch.Tensor | MasterWeights]:
        """{"param": master weights, "exp_avg": ..., "exp_avg_sq": ...} of this rank's shard, to read and to set."""
        param = adam_param(self.optimizer, model_param)
        masters: torch.Tensor | MasterWeights = self.host["param"][param] if "param" in self.host else param
        if self.keeps_remainders:
            masters = MasterWeights(self.model_shards[param], self.host["param"][param])
        return {"param": masters, **self.adam.state[param]}

    def read(self, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        """`state_of` as tensors, the master weights in float32."""
        states = self.state_of(model_param).items()
        return {
            name: merge(each.weight, each.remainder) if isinstance(each, MasterWeights) else each
            for name, each in states
        }

    def write(self, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Copies `tensors` into `state_of`; raises KitError if master weights are not those of the weights."""
        for name, tensor in self.state_of(model_param).items():
            if name in tensors:
                tensor.copy_(tensors[name])

    def _load_param_groups(self, state_dict: dict[str, Any]) -> None:
        """Replaces Adam's load_state_dict, which would move all moments to the device; they are in place already."""
        for group, saved in zip(self.adam.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def cut(params: list[torch.Tensor], size: int) -> list[list[Piece]]:
    """`params` in parts of `size` elements, the last one of the rest."""
    parts: list[list[Piece]] = []
    left = 0
    for param in params:
        start = 0
        while start < param.numel():
            if not left:
                parts.append([])
                left = size
            stop = min(param.numel(), start + left)
            parts[-1].append(Piece(param, start, stop, size - left))
            left -= stop - start
            start = stop
    return parts


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
