"""What torch and Megatron-Core would unpickle is scanned before: code in a checkpoint is named, not run."""

import io
import json
import os
import pickle
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.enums import ModelType
from torch.distributed.checkpoint import metadata as dcp

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.verification import pickle_scan
from common.checkpoint.verification.pickle_scan import check_pickles
from common.errors import KitError
from tests.unit.checkpoint.opcodes import Runs, archive, named

WEIGHT, STATE = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc1._extra_state"
RANDOM = [{"random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(),
           "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {"a": torch.get_rng_state()}}]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():  # for which Megatron-Core waits before it writes
            patch.setattr(torch.cuda, "synchronize", lambda: None)
            patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        yield
    dist.destroy_process_group()


def megatrons_own_globals(classes: list[type]) -> AbstractContextManager[Any]:
    """A context in which torch.load takes `classes` from a file; before torch 2.5 it takes any."""
    allow = getattr(torch.serialization, "safe_globals", None)
    return allow(classes) if allow else nullcontext()


def sharded(name: str, value: Any) -> ShardedObject:
    return ShardedObject(name, value, (1,), (0,))


def write(path: Path, *, common: Any = None, **objects: Any) -> Checkpoint:
    """A checkpoint that Megatron-Core's own code writes."""
    path.mkdir(parents=True)
    state = {"weight": ShardedTensor.from_rank_offsets(WEIGHT, torch.arange(8.0)), "common": common}
    state |= {name: sharded(name, value) for name, value in objects.items()}
    dist_checkpointing.save(state, str(path), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
    return Checkpoint(path.parent, path, 1, "torch_dist")


def megatron_loads(checkpoint: Checkpoint, *names: str) -> Any:
    state_dict = {"weight": ShardedTensor.from_rank_offsets(WEIGHT, torch.zeros(8))}
    return dist_checkpointing.load(state_dict | {name: sharded(name, None) for name in names}, str(checkpoint.path))


def code(marker: Path) -> Runs:
    return Runs(open, str(marker), "w")


def change_metadata(checkpoint: Checkpoint, edit: Callable[[Any], object]) -> None:
    path = checkpoint.path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_what_megatron_core_writes_passes_and_is_loaded(tmp_path: Path) -> None:
    arguments = Namespace(model_type=ModelType.encoder_or_decoder, params_dtype=torch.bfloat16, save=Path("/a"))
    checkpoint = write(tmp_path / "iter_0000001", rng_state=RANDOM, common={"run": {"args": arguments, "x": [1, None]}})
    check_pickles(checkpoint)
    with megatrons_own_globals([Namespace, ModelType, type(Path())]):
        loaded = megatron_loads(checkpoint, "rng_state")
    assert torch.equal(loaded["weight"], torch.arange(8.0)) and loaded["common"]["run"]["args"] == arguments
    assert (loaded["rng_state"][0]["np_rng_state"][1] == RANDOM[0]["np_rng_state"][1]).all()


@pytest.mark.parametrize("where", ["planner_data", "all_local_plans", "version", "storage_meta"])
def test_code_in_metadata_is_named_and_not_run(where: str, tmp_path: Path) -> None:
    checkpoint, marker = write(tmp_path / "iter_0000001"), tmp_path / "ran"
    change_metadata(checkpoint, lambda metadata: setattr(metadata, where, code(marker)))
    with pytest.raises(KitError, match=r"iter_0000001/\.metadata references _?io\.open, .*it was not loaded"):
        check_pickles(checkpoint)
    assert not marker.exists()
    megatron_loads(checkpoint)
    assert marker.exists()  # what was prevented above


def test_code_in_an_object_among_the_tensors_is_named_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    checkpoint = write(tmp_path / "iter_0000001", rng_state=[{"random_rng_state": code(marker)}])
    with pytest.raises(KitError, match=r"iter_0000001/__0_\d\.distcp references _?io\.open, .*it was not loaded"):
        check_pickles(checkpoint)
    assert not marker.exists()
    megatron_loads(checkpoint, "rng_state")
    assert marker.exists()


def test_code_in_the_place_of_a_tensor_or_of_the_common_part_is_named(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "iter_0000001")
    (data,) = (path for path in checkpoint.path.glob("*.distcp") if path.stat().st_size)
    valid, hostile = data.read_bytes(), archive(named("posix", "system"))
    data.write_bytes(valid + hostile)

    def move(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.length = len(valid), len(hostile)

    change_metadata(checkpoint, move)
    with pytest.raises(KitError, match=r"__0_\d\.distcp references posix\.system"):
        check_pickles(checkpoint)
    (checkpoint.path / "common.pt").write_bytes(hostile)
    with pytest.raises(KitError, match=r"common\.pt references posix\.system"):
        check_pickles(checkpoint)


def fp8_tensor(value: Any) -> torch.Tensor:
    """As Transformer Engine's get_extra_state gives it."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def saved(value: Any, *, old: bool = False) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not old)
    return stream


SCALES = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(16, 3), "extra_fp8_variables": {"num_gemms": 1}}


@pytest.mark.parametrize("state", [
    fp8_tensor(SCALES), saved(SCALES), saved(SCALES, old=True), torch.empty(0, dtype=torch.uint8), io.BytesIO(), None,
])  # fmt: skip
def test_fp8_state_passes(state: Any, tmp_path: Path) -> None:
    check_pickles(write(tmp_path / "iter_0000001", **{STATE: state}))
    check_pickles(rank_files(tmp_path / "torch", {"model": {STATE: state, "weight": torch.ones(2)}}))


@pytest.mark.parametrize("how", [fp8_tensor, saved, lambda value: saved(value, old=True)])
def test_code_in_fp8_state_is_named(how: Callable[[Any], Any], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    state = how({**SCALES, "recipe": code(marker)})
    with pytest.raises(KitError, match=r"__0_\d\.distcp references _?io\.open"):
        check_pickles(write(tmp_path / "iter_0000001", **{STATE: state}))
    with pytest.raises(KitError, match=r"mp_rank_00/model_optim_rng\.pt references _?io\.open"):
        check_pickles(rank_files(tmp_path / "torch", {"model": {STATE: state}}))
    assert not marker.exists()


def test_storages_in_fp8_state_are_no_larger_than_what_is_there(tmp_path: Path) -> None:
    for state in (fp8_tensor(SCALES), saved(SCALES, old=True)):
        data = state.numpy().tobytes() if isinstance(state, torch.Tensor) else state.getvalue()
        assert b"K\x30" in data  # 48 numbers
        grown = data.replace(b"K\x30N", b"K\xffN") if b"K\x30N" in data else data.replace(b"K\x30", b"K\xff", 1)
        value: Any = torch.frombuffer(bytearray(grown), dtype=torch.uint8)
        value = value if isinstance(state, torch.Tensor) else io.BytesIO(grown)
        with pytest.raises(KitError, match=r"has a damaged _extra_state|calls (torch|megatron\.core\.safe_globals)"):
            check_pickles(write(tmp_path / f"{len(data)}" / "iter_0000001", **{STATE: value}))


def rank_files(path: Path, state: Any, *optimizers: Any) -> Checkpoint:
    """torch format: `state` of tensor rank 0, an optimizer of each rank."""
    for rank in range(max(len(optimizers), 1)):
        (path / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save(state if rank == 0 else {"model": {}}, path / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    for rank, optimizer in enumerate(optimizers):
        torch.save(optimizer, path / f"mp_rank_{rank:02d}" / "distrib_optim.pt")
    return Checkpoint(path.parent, path, 1, "torch")


def test_code_in_the_optimizer_of_any_rank_is_named(tmp_path: Path) -> None:
    valid, marker = {0: {(torch.bfloat16, torch.float32): {"param": torch.ones(4)}}}, tmp_path / "ran"
    model = {"model": {"a": torch.ones(2)}, "args": Namespace(kind=ModelType.encoder_or_decoder), "rng_state": RANDOM}
    check_pickles(rank_files(tmp_path / "sound", model, valid, valid))
    with pytest.raises(KitError, match=r"mp_rank_01/distrib_optim\.pt references _?io\.open"):
        check_pickles(rank_files(tmp_path / "second", model, valid, {**valid, "a": code(marker)}))
    with pytest.raises(KitError, match=r"mp_rank_00/model_optim_rng\.pt references _?io\.open"):
        check_pickles(rank_files(tmp_path / "model", {**model, "args": code(marker)}, valid))
    assert not marker.exists()


def test_files_that_are_not_the_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "iter_0000001")
    good = (checkpoint.path / ".metadata").read_bytes()
    for field, value, message in (
        ("relative_path", "../elsewhere", "in '../elsewhere', which is not a plain file of the checkpoint"),
        ("relative_path", "/dev/zero", "in '/dev/zero', which is not a plain file of the checkpoint"),
        ("relative_path", "nothing", "nothing is missing"),
        ("transform_descriptors", ["stream.zstd"], "which is not a plain file of the checkpoint"),
        ("offset", -1, "has an invalid entry in storage_data"),
        ("length", 1 << 40, "copy it again"),
        ("length", "1", "has an invalid entry in storage_data"),
    ):
        (checkpoint.path / ".metadata").write_bytes(good)
        change_metadata(
            checkpoint,
            lambda found, field=field, value=value: setattr(next(iter(found.storage_data.values())), field, value),
        )
        with pytest.raises(KitError, match=message):
            check_pickles(checkpoint)
    (checkpoint.path / ".metadata").write_bytes(pickle.dumps(dcp.Metadata({}, None, [1])))
    with pytest.raises(KitError, match="has an invalid storage_data"):
        check_pickles(checkpoint)


@pytest.mark.parametrize("field", ["sharded_backend", "common_backend"])
def test_another_backend_is_refused(field: str, tmp_path: Path) -> None:
    """zarr's arrays of objects are pickles too, and Megatron-Core before 0.15 reads them."""
    checkpoint = write(tmp_path / "iter_0000001")
    path = checkpoint.path / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "zarr"}))
    with pytest.raises(KitError, match=rf"metadata\.json: {field} is not torch"):
        check_pickles(checkpoint)
    path.write_text("[" * 100_000)
    with pytest.raises(KitError, match=r"metadata\.json is nested deeper than 64"):
        check_pickles(checkpoint)


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, count = tmp_path / "iter_0000001", [0]
    path.mkdir()
    large = {f"{WEIGHT} {i}": ShardedTensor.from_rank_offsets(f"w{i}", torch.zeros(1 << 22)) for i in range(4)}
    dist_checkpointing.save(large, str(path), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
    read = os.pread

    def counted(handle: int, size: int, offset: int) -> bytes:
        data = read(handle, size, offset)
        count[0] += len(data)
        return data

    monkeypatch.setattr(pickle_scan.os, "pread", counted)
    check_pickles(Checkpoint(tmp_path, path, 1, "torch_dist"))
    assert 0 < count[0] < 100_000 < sum(file.stat().st_size for file in path.iterdir()) / 600
