"""The optimizer's state on the host: the same steps, and nothing of it on the device between them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common import platforms
from common.errors import KitError
from common.training.host_state import HostState, check_host_memory, gradients_away
from common.training.optimizer import step_in_parts

SIZES = (3, 4, 9, 2)


def distributed_optimizer(precision: str) -> Any:
    """What HostState reads of Megatron-Core's: two groups of two parameters, sharded whole."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in SIZES]
    shards = [param.detach().view(-1) for param in model]
    masters = [shard.clone().float() for shard in shards] if precision == "bf16" else shards
    groups = [{"params": masters[:2]}, {"params": masters[2:], "weight_decay": 0.3}]
    halves = {"masters": [masters[:2], masters[2:]], "shards": [shards[:2], shards[2:]]}
    if precision != "bf16":
        halves = {"masters": [[], []], "shards": [[], []]}
    return SimpleNamespace(
        optimizer=torch.optim.AdamW(groups, lr=0.1), model=model, shards=shards,
        shard_fp32_from_float16_groups=halves["masters"], shard_float16_groups=halves["shards"],
        model_param_group_index_map={param: divmod(index, 2) for index, param in enumerate(model)},
    )  # fmt: skip


def step(of: Any, number: int) -> None:
    for index, param in enumerate(of.model):
        group, order = of.model_param_group_index_map[param]
        master = of.optimizer.param_groups[group]["params"][order]
        master.grad = None if index == 3 else torch.full(master.shape, 0.1 * (number + index))
    of.optimizer.step()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_steps_are_the_same_and_nothing_is_left_on_the_device(precision: str) -> None:
    plain, moved = distributed_optimizer(precision), distributed_optimizer(precision)
    host = HostState(moved)
    brought: list[int] = []

    def watched(params: list[torch.Tensor]) -> Any:
        brought.append(sum(param.numel() for param in params))
        return host.on_device(params)

    step_in_parts(moved.optimizer, 7, watched)
    masters = [param for group in moved.optimizer.param_groups for param in group["params"]]
    for number in range(3):
        step(plain, number)
        step(moved, number)
        if precision == "bf16":
            for shard, master in zip(plain.shards, plain.optimizer.param_groups[0]["params"], strict=False):
                shard.copy_(master)  # as Megatron-Core does after a step
            assert all(master.untyped_storage().nbytes() == 0 for master in masters)
        assert all(torch.equal(a, b) for a, b in zip(plain.shards[:2], moved.shards[:2], strict=True))
    assert brought[:3] == [7, 9, 2] and len(brought) == 9
    for index, param in enumerate(moved.model):
        group, order = divmod(index, 2)
        theirs = plain.optimizer.param_groups[group]["params"][order]
        found = moved._get_main_param_and_optimizer_states(param)
        assert torch.equal(found["param"], theirs)
        assert found.keys() - {"param"} == plain.optimizer.state[theirs].keys()
        assert all(torch.equal(found[name], value) for name, value in plain.optimizer.state[theirs].items())


def test_what_is_loaded_is_what_the_next_step_begins_from() -> None:
    plain, moved = distributed_optimizer("bf16"), distributed_optimizer("bf16")
    host = HostState(moved)
    step_in_parts(moved.optimizer, 7, host.on_device)
    host.make_moments()
    for number in range(2):
        step(plain, number)
    states = [host.read(param) for param in moved.model]
    assert all(set(state) == {"param", "exp_avg", "exp_avg_sq", "step"} for state in states)
    for index, param in enumerate(moved.model):
        group, order = divmod(index, 2)
        theirs = plain.optimizer.param_groups[group]["params"][order]
        moved._set_main_param_and_optimizer_states(param, {"param": theirs, **plain.optimizer.state[theirs]})
    assert [state["param"].data_ptr() for state in states] == [host.read(p)["param"].data_ptr() for p in moved.model]
    given = moved.optimizer.state_dict()
    given["param_groups"][1]["lr"] = 0.02
    moved.optimizer.load_state_dict(given)
    plain.optimizer.param_groups[1]["lr"] = 0.02
    step(plain, 2)
    step(moved, 2)
    for index, param in enumerate(moved.model):
        group, order = divmod(index, 2)
        assert torch.equal(host.read(param)["param"], plain.optimizer.param_groups[group]["params"][order])


def test_master_weights_are_made_again_from_the_models() -> None:
    moved = distributed_optimizer("bf16")
    host = HostState(moved)
    for shard in moved.shards:
        shard.fill_(3.0)
    moved._copy_model_params_to_main_params()
    assert all(host.read(param)["param"].eq(3.0).all() for param in moved.model)


def test_gradients_are_away_while_master_weights_are_made_and_zeros_after() -> None:
    buffer = SimpleNamespace(grad_data=torch.ones(6))
    view = buffer.grad_data[2:4]
    chunk = SimpleNamespace(buffers=[buffer], zero_grad_buffer=lambda: buffer.grad_data.zero_())
    with gradients_away([chunk]):
        assert buffer.grad_data.untyped_storage().nbytes() == 0
    assert view.tolist() == [0.0, 0.0] and buffer.grad_data.untyped_storage().nbytes() == 24


def test_a_node_without_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    model = [torch.nn.Linear(1 << 10, 1 << 10, bias=False).bfloat16()]  # 12 MiB of state
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {24 << 10} kB\n", encoding="utf-8")
    check_host_memory(model, 2)
    with pytest.raises(KitError, match=r"keeps 0\.0 GiB a process .* for 4 processes here, and 0\.0 GiB are available"):
        check_host_memory(model, 1)
    check_host_memory([torch.nn.Linear(1 << 10, 768, bias=False)], 1)  # 8 bytes each: master weights are the model's
