"""The optimizer's state on the host: the same steps, and nothing of it on the device between them."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import KitError
from common.training.state import optimizer_offload
from common.training.state.optimizer import step_in_parts
from common.training.state.optimizer_offload import (
    OffloadedState,
    check_host_memory,
    offloaded_bytes,
    released_gradients,
)

SIZES = (3, 4, 9, 2, 5, 1)
PARTS, AT_ONCE = [3, 4, 9, 2, 5, 1], 8  # of 4 parameters, or of a tensor that has more
HELD = [3 + 4, 4, 9, 2 + 5, 5 + 1, 1]  # each part and the next, but for 4 and 9: together they are over AT_ONCE
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def distributed_optimizer(precision: str) -> Any:
    """What OffloadedState reads of Megatron-Core's: two groups of three parameters, each parameter one shard."""
    torch.manual_seed(0)
    model = [torch.nn.Parameter(torch.randn(size).to(TYPES[precision])) for size in SIZES]
    shards = [param.detach().view(-1) for param in model]
    masters = [shard.clone().float() for shard in shards] if precision == "bf16" else shards
    groups = [{"params": masters[:3]}, {"params": masters[3:], "weight_decay": 0.3}]
    halves = {"masters": [masters[:3], masters[3:]], "shards": [shards[:3], shards[3:]]}
    if precision != "bf16":
        halves = {"masters": [[], []], "shards": [[], []]}
    return SimpleNamespace(
        optimizer=torch.optim.AdamW(groups, lr=0.1), model=model, shards=shards,
        shard_fp32_from_float16_groups=halves["masters"], shard_float16_groups=halves["shards"],
        model_param_group_index_map={param: divmod(index, 3) for index, param in enumerate(model)},
    )  # fmt: skip


def moved_to_the_host(precision: str) -> tuple[Any, OffloadedState]:
    moved = distributed_optimizer(precision)
    host = OffloadedState(moved, AT_ONCE)
    step_in_parts(moved.optimizer, AT_ONCE // 2, host.on_device)
    return moved, host


def master(of: Any, param: torch.Tensor) -> torch.Tensor:
    group, order = of.model_param_group_index_map[param]
    return of.optimizer.param_groups[group]["params"][order]


class LateCopies:
    """Copies made only when something waits for them: as late as those of a GPU may be."""

    def __init__(self, stream: None, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.pairs = pairs

    def synchronize(self) -> None:
        for target, source in self.pairs:
            assert source.untyped_storage().nbytes() and target.untyped_storage().nbytes()  # freed too soon
            target.copy_(source)
        self.pairs = []

    wait = synchronize


def step(of: Any, number: int) -> None:
    for index, param in enumerate(of.model):
        value = torch.full(param.shape, 0.1 * (number + index))
        master(of, param).grad = None if index == 3 else value
    of.optimizer.step()


@pytest.mark.parametrize("copies", [optimizer_offload.copy_async, LateCopies], ids=["at once", "late"])
@pytest.mark.parametrize("precision", TYPES)
def test_steps_are_the_same_and_nothing_is_left_on_the_device(
    precision: str, copies: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_offload, "copy_async", copies)
    plain, moved = distributed_optimizer(precision), distributed_optimizer(precision)
    host = OffloadedState(moved, AT_ONCE)
    masters = [param for group in moved.optimizer.param_groups for param in group["params"]]
    brought, held = [], []

    def watched(parts: list[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
        for params in host.on_device(parts):
            brought.append(sum(param.numel() for param in params))
            held.append(sum(param.untyped_storage().nbytes() for param in masters) // 4)
            yield params

    step_in_parts(moved.optimizer, AT_ONCE // 2, watched)
    for number in range(3):
        step(plain, number)
        step(moved, number)
        if precision == "bf16":
            for shard, param in zip(plain.shards, plain.model, strict=True):
                shard.copy_(master(plain, param))  # as Megatron-Core does after a step
            assert all(param.untyped_storage().nbytes() == 0 for param in masters)
        assert all(torch.equal(a, b) for a, b in zip(plain.shards, moved.shards, strict=True))
    assert brought == 3 * PARTS and held == 3 * (HELD if precision == "bf16" else [sum(SIZES)] * len(SIZES))
    for param, other in zip(moved.model, plain.model, strict=True):
        theirs, found = master(plain, other), moved._get_main_param_and_optimizer_states(param)
        assert torch.equal(found["param"], theirs)
        assert found.keys() - {"param"} == plain.optimizer.state[theirs].keys()
        assert all(torch.equal(found[name], value) for name, value in plain.optimizer.state[theirs].items())


def test_what_is_loaded_is_what_the_next_step_begins_from() -> None:
    plain = distributed_optimizer("bf16")
    moved, host = moved_to_the_host("bf16")
    host.initialize_moments()
    for number in range(2):
        step(plain, number)
    states = [host.read(param) for param in moved.model]
    assert all(set(state) == {"param", "exp_avg", "exp_avg_sq", "step"} for state in states)
    for param, other in zip(moved.model, plain.model, strict=True):
        theirs = master(plain, other)
        moved._set_main_param_and_optimizer_states(param, {"param": theirs, **plain.optimizer.state[theirs]})
    assert [state["param"].data_ptr() for state in states] == [host.read(p)["param"].data_ptr() for p in moved.model]
    given = moved.optimizer.state_dict()
    given["param_groups"][1]["lr"] = 0.02
    moved.optimizer.load_state_dict(given)
    plain.optimizer.param_groups[1]["lr"] = 0.02
    step(plain, 2)
    step(moved, 2)
    for param, other in zip(moved.model, plain.model, strict=True):
        assert torch.equal(host.read(param)["param"], master(plain, other))


def test_master_weights_are_made_again_from_the_models() -> None:
    moved, host = moved_to_the_host("bf16")
    for shard in moved.shards:
        shard.fill_(3.0)
    moved._copy_model_params_to_main_params()
    assert all(host.read(param)["param"].eq(3.0).all() for param in moved.model)


@pytest.mark.parametrize(("precision", "kinds"), [("bf16", 3), ("fp32", 2)])
def test_the_memory_that_is_taken_is_that_which_is_counted(precision: str, kinds: int) -> None:
    optimizer = distributed_optimizer(precision)
    counted = offloaded_bytes(optimizer)
    host = OffloadedState(optimizer, AT_ONCE)
    assert sum(counted.values()) == sum(map(len, host.buffers.values())) == kinds * 4 * sum(SIZES)
    for kind, buffer in host.buffers.items():
        tensors = list(host.host[kind].values())
        # All of a buffer is used, and each tensor's storage ends with it: a writer copies what is part of a larger one.
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [4 * size for size in SIZES]
        start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
        places = [start + 4 * sum(SIZES[:index]) for index in range(len(SIZES))]
        assert [tensor.data_ptr() for tensor in tensors] == places


def test_a_rank_without_a_shard_needs_nothing() -> None:
    empty = SimpleNamespace(param_groups=[{"params": []}, {"params": []}], state={}, load_state_dict=None)
    optimizer = SimpleNamespace(
        optimizer=empty, shard_fp32_from_float16_groups=[[]], shard_float16_groups=[[]], model_param_group_index_map={}
    )
    host = OffloadedState(optimizer, AT_ONCE)
    assert host.buffers == {} and list(host.on_device([])) == []


def test_a_forked_process_shares_the_memory_of_its_rank() -> None:
    moved, host = moved_to_the_host("bf16")
    place = host.read(moved.model[0])["param"]
    child = os.fork()
    if not child:
        place.fill_(7.0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and place.eq(7.0).all()


def test_gradients_are_freed_while_master_weights_are_made_and_zero_afterwards() -> None:
    buffer = SimpleNamespace(grad_data=torch.ones(6))
    view = buffer.grad_data[2:4]
    chunk = SimpleNamespace(buffers=[buffer], zero_grad_buffer=lambda: buffer.grad_data.zero_())
    with released_gradients([chunk]):
        assert buffer.grad_data.untyped_storage().nbytes() == 0
    assert view.tolist() == [0.0, 0.0] and buffer.grad_data.untyped_storage().nbytes() == 24


def test_a_node_without_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two ranks each; on the second another rank holds ten bytes, or finds less memory."""
    optimizer = distributed_optimizer("bf16")
    own = 12 * sum(SIZES)
    others = [(0, own, 2 * own), (1, own, 9 * own), (1, 10, own + 10)]

    def gather(found: list[Any], given: Any) -> None:
        found[:] = [given, *others]

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setattr(optimizer_offload, "available_memory", lambda: 2 * own)
    check_host_memory([optimizer])
    check_host_memory([])
    monkeypatch.setattr(optimizer_offload, "available_memory", lambda: 2 * own - 1)
    with pytest.raises(KitError, match=r"keeps 0\.0 GiB in the memory of node 0, for 2 processes, and 0\.0 GiB are"):
        check_host_memory([optimizer])
    others[2] = (1, 10, own + 9)
    monkeypatch.setattr(optimizer_offload, "available_memory", lambda: 2 * own)
    with pytest.raises(KitError, match="in the memory of node 1"):
        check_host_memory([optimizer])
