"""The optimizer's state on the host: the same steps, and nothing of it on the device between them."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import KitError
from common.training.state import host_memory, offload_memory, optimizer_offload
from common.training.state.master_weights import MasterWeights, split
from common.training.state.offload_memory import check_host_memory, offloaded_bytes
from common.training.state.optimizer import step_in_parts
from common.training.state.optimizer_offload import OffloadedState, released_gradients

SIZES = (3, 4, 9, 2, 5, 1)
PART = 4
PIECES = [[3, 1], [3, 1], [4], [4], [2, 2], [3, 1]]  # two groups of three parameters, of 16 and 8 elements
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = [("bf16", "cpu"), ("fp32", "cpu"), ("bf16", "cpu_bf16")]  # precision and OPTIMIZER_STATE
MOMENTS = ("exp_avg", "exp_avg_sq")


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


def moved_to_the_host(precision: str = "bf16", kind: str = "cpu") -> tuple[Any, OffloadedState]:
    moved = distributed_optimizer(precision)
    host = OffloadedState(moved, kind, PART)
    step_in_parts(moved.optimizer, host.on_device)
    return moved, host


def master(of: Any, param: torch.Tensor) -> torch.Tensor:
    group, order = of.model_param_group_index_map[param]
    return of.optimizer.param_groups[group]["params"][order]


class LateCopies:
    """Copies made only when something waits for them: as late as those of a GPU may be."""

    pending, most = 0, 0

    def __init__(self, stream: None, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.pairs = pairs
        self.count(len(pairs) > 0)

    @classmethod
    def count(cls, more: int) -> None:
        cls.pending += more
        cls.most = max(cls.most, cls.pending)

    def synchronize(self) -> None:
        for target, source in self.pairs:
            assert source.untyped_storage().nbytes() and target.untyped_storage().nbytes()  # freed too soon
            target.copy_(source)
        self.count(-(len(self.pairs) > 0))
        self.pairs = []

    wait = synchronize


def step(of: Any, number: int) -> None:
    for index, param in enumerate(of.model):
        value = torch.full(param.shape, 0.1 * (number + index))
        master(of, param).grad = None if index == 3 else value
    of.optimizer.step()


def round_state(of: Any, kind: str) -> None:
    """What a step leaves of its float32 state; the weights are set, as Megatron-Core does after it."""
    for shard, param in zip(of.shards, of.model, strict=True):
        weights = master(of, param)
        shard.copy_(split(weights)[0] if kind == "cpu_bf16" else weights)
        state = of.optimizer.state.get(weights, {})
        for name in MOMENTS if kind == "cpu_bf16" and state else ():
            state[name] = state[name].bfloat16().float()


def assert_same_state(moved: Any, plain: Any) -> None:
    for param, other in zip(moved.model, plain.model, strict=True):
        theirs, found = master(plain, other), moved._get_main_param_and_optimizer_states(param)
        assert found["param"].dtype == torch.float32 and torch.equal(found["param"], theirs)
        # A parameter without a gradient has moments of zero here, and none there.
        expected = plain.optimizer.state[theirs] or dict.fromkeys(MOMENTS, torch.zeros_like(theirs))
        assert all(torch.equal(found[name].float(), value) for name, value in expected.items())


@pytest.mark.parametrize("copies", [optimizer_offload.copy_async, LateCopies], ids=["at once", "late"])
@pytest.mark.parametrize(("precision", "kind"), KINDS)
def test_steps_are_the_same_and_nothing_is_left_on_the_device(
    precision: str, kind: str, copies: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_offload, "copy_async", copies)
    plain, moved = distributed_optimizer(precision), distributed_optimizer(precision)
    host = OffloadedState(moved, kind, PART)
    masters = [param for group in moved.optimizer.param_groups for param in group["params"]]
    brought = []

    def watched(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        for pieces in host.on_device(params):
            assert all(piece.dtype == torch.float32 for piece in pieces)
            brought.append([piece.numel() for piece in pieces])
            yield pieces

    step_in_parts(moved.optimizer, watched)
    LateCopies.most = 0
    for number in range(3):
        step(plain, number)
        step(moved, number)
        round_state(plain, kind)
        assert all(torch.equal(a, b) for a, b in zip(plain.shards, moved.shards, strict=True))
        assert set(moved.optimizer.state) == set(masters)
    assert brought == 3 * PIECES
    assert copies is not LateCopies or (LateCopies.most, LateCopies.pending) == (3, 0)  # one comes, one goes
    if precision == "bf16":
        assert all(param.untyped_storage().nbytes() == 0 for param in masters)
    assert_same_state(moved, plain)


@pytest.mark.parametrize("kind", ["cpu", "cpu_bf16"])
def test_what_is_loaded_is_what_the_next_step_begins_from(kind: str) -> None:
    plain = distributed_optimizer("bf16")
    moved, host = moved_to_the_host("bf16", kind)
    host.initialize_moments()
    for number in range(2):
        step(plain, number)
        round_state(plain, kind)
    states = [host.state_of(param) for param in moved.model]
    assert all(set(state) == {"param", "exp_avg", "exp_avg_sq", "step"} for state in states)
    for param, other, shard, source in zip(moved.model, plain.model, moved.shards, plain.shards, strict=True):
        theirs = master(plain, other)
        shard.copy_(source)  # weights first
        moved._set_main_param_and_optimizer_states(param, {"param": theirs, **plain.optimizer.state[theirs]})
    assert [state["exp_avg"].data_ptr() for state in states] == [
        host.state_of(param)["exp_avg"].data_ptr() for param in moved.model
    ]
    assert all(isinstance(state["param"], MasterWeights) == (kind == "cpu_bf16") for state in states)
    given = moved.optimizer.state_dict()
    given["param_groups"][1]["lr"] = 0.02
    moved.optimizer.load_state_dict(given)
    plain.optimizer.param_groups[1]["lr"] = 0.02
    step(plain, 2)
    step(moved, 2)
    round_state(plain, kind)
    assert_same_state(moved, plain)


def test_a_step_at_a_rate_of_zero_changes_no_bit() -> None:
    """Of a tie either, which to the nearest even number would be another weight, without room for what it lacks."""
    moved, host = moved_to_the_host("bf16", "cpu_bf16")
    masters = [torch.arange(size, dtype=torch.int32) * 0x8000 + 0x3F808000 for size in SIZES]
    for param, shard, bits in zip(moved.model, moved.shards, masters, strict=True):
        shard.copy_(split(bits.view(torch.float32))[0])
        host.write(param, {"param": bits.view(torch.float32)})
    weights = [shard.clone() for shard in moved.shards]
    for group in moved.optimizer.param_groups:
        group["lr"] = 0.0
    step(moved, 1)
    for param, shard, weight, bits in zip(moved.model, moved.shards, weights, masters, strict=True):
        assert torch.equal(shard, weight) and torch.equal(host.read(param)["param"].view(torch.int32), bits)


def test_master_weights_of_other_weights_are_refused() -> None:
    moved, _ = moved_to_the_host("bf16", "cpu_bf16")
    with pytest.raises(KitError, match="3 of 3 master weights are not those of the weights"):
        moved._set_main_param_and_optimizer_states(moved.model[0], {"param": torch.full((3,), 9.0)})


@pytest.mark.parametrize("kind", ["cpu", "cpu_bf16"])
def test_master_weights_are_made_again_from_the_models(kind: str) -> None:
    moved, host = moved_to_the_host("bf16", kind)
    step(moved, 0)
    pairs = zip(moved.model, moved.shards, strict=True)
    assert not all(host.read(param)["param"].equal(shard.float()) for param, shard in pairs)
    for shard in moved.shards:
        shard.fill_(3.0)
    moved._copy_model_params_to_main_params()
    assert all(host.read(param)["param"].eq(3.0).all() for param in moved.model)


@pytest.mark.parametrize(
    ("precision", "kind", "sizes"), [(*KINDS[0], [4] * 3), (*KINDS[1], [4] * 2), (*KINDS[2], [2] * 3)]
)
def test_the_memory_that_is_taken_is_that_which_is_counted(
    precision: str, kind: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.Tensor] = []

    def host_buffer(*given: Any, **more: Any) -> torch.Tensor:
        taken.append(host_memory.host_buffer(*given, **more))
        return taken[-1]

    monkeypatch.setattr(offload_memory, "host_buffer", host_buffer)
    optimizer = distributed_optimizer(precision)
    counted = offloaded_bytes(optimizer, kind)
    host = OffloadedState(optimizer, kind, PART)
    (buffer,) = taken
    assert counted == buffer.nbytes == sum(sizes) * sum(SIZES)
    place = buffer.data_ptr()
    for flat, tensors in zip(host.flat.values(), host.host.values(), strict=True):
        assert flat.data_ptr() == place
        for tensor, count in zip(tensors.values(), SIZES, strict=True):
            size = flat.itemsize * count
            # Each tensor's storage ends with it: a writer copies what is part of a larger one.
            assert (tensor.data_ptr(), tensor.untyped_storage().nbytes()) == (place, size)
            place += size
    assert place == buffer.data_ptr() + buffer.nbytes  # all of it is used


def test_a_rank_without_a_shard_needs_nothing() -> None:
    empty = SimpleNamespace(param_groups=[{"params": []}, {"params": []}], state={}, load_state_dict=None)
    optimizer = SimpleNamespace(
        optimizer=empty, shard_fp32_from_float16_groups=[[]], shard_float16_groups=[[]], model_param_group_index_map={}
    )
    for kind in ("cpu", "cpu_bf16"):
        host = OffloadedState(optimizer, kind, PART)
        host.reload()
        assert host.flat == {} and list(host.on_device([])) == []


def test_gradients_are_freed_while_master_weights_are_made_and_zero_afterwards() -> None:
    buffer = SimpleNamespace(grad_data=torch.ones(6))
    view = buffer.grad_data[2:4]
    chunk = SimpleNamespace(buffers=[buffer], zero_grad_buffer=lambda: buffer.grad_data.zero_())
    with released_gradients([chunk]):
        assert buffer.grad_data.untyped_storage().nbytes() == 0
    assert view.tolist() == [0.0, 0.0] and buffer.grad_data.untyped_storage().nbytes() == 24


@pytest.mark.parametrize(
    ("kind", "size", "remedy"), [("cpu", 12, "cpu_bf16, which needs half of it,"), ("cpu_bf16", 6, "bf16")]
)
def test_a_node_without_the_memory_is_refused(
    kind: str, size: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of two ranks each; on the second another rank holds ten bytes, or finds less memory."""
    optimizer = distributed_optimizer("bf16")
    own = size * sum(SIZES)
    others = [(0, own, 2 * own), (1, own, 9 * own), (1, 10, own + 10)]

    def gather(found: list[Any], given: Any) -> None:
        found[:] = [given, *others]

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setattr(offload_memory, "available_memory", lambda: 2 * own)
    check_host_memory([optimizer], kind)
    check_host_memory([], kind)
    monkeypatch.setattr(offload_memory, "available_memory", lambda: 2 * own - 1)
    text = rf"^OPTIMIZER_STATE={kind} keeps 0\.0 GiB in the memory of node 0, for 2 processes, .* to {remedy}"
    with pytest.raises(KitError, match=text):
        check_host_memory([optimizer], kind)
    others[2] = (1, 10, own + 9)
    monkeypatch.setattr(offload_memory, "available_memory", lambda: 2 * own)
    with pytest.raises(KitError, match="in the memory of node 1"):
        check_host_memory([optimizer], kind)
