"""torch_dist against the originals: torch.distributed.checkpoint and Megatron-Core read and write the other side."""

import io
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.checkpoint.formats.torch_dist_writer import TensorShard, write_torch_dist
from common.checkpoint.io.checksums import CHECKSUMS
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.errors import KitError
from tests.unit.checkpoint.small import bitwise_equal, save_with_torch

FC2 = "decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Megatron-Core write without a GPU, on which it would synchronize first."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def block(key: str, shape: tuple[int, ...], offsets: tuple[int, ...], tensor: Tensor) -> TensorShard:
    return TensorShard(key, shape, offsets, LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: [[tensor]]))


def full_shard(key: str, tensor: Tensor) -> TensorShard:
    return block(key, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def write(path: Path, *blocks: TensorShard) -> Path:
    """Without checksums, which would find what these tests change before it is read; test_checksums.py has them."""
    write_torch_dist(path, blocks, {"checkpoint_version": 3.0, "iteration": 0}, lambda size: None)
    (path / CHECKSUMS).unlink()
    return path


def tensors() -> dict[str, Tensor]:
    return {
        "embedding.word_embeddings.weight": torch.randn(11, 8),
        FC2: torch.randn(4, 8, 6),
        "decoder.final_layernorm.weight": torch.randn(8).bfloat16(),
        "half": torch.randn(3).half(),
    }


def blocks_of(state: dict[str, Tensor]) -> list[TensorShard]:
    """The tensors; those of the layers as one block per layer."""
    blocks: list[TensorShard] = []
    for key, tensor in state.items():
        if key == FC2:
            blocks += [block(key, (4, 8, 6), (layer, 0, 0), tensor[layer : layer + 1]) for layer in range(4)]
        else:
            blocks.append(full_shard(key, tensor))
    return blocks


def load_with_torch(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    empty: dict[str, Any] = {key: torch.full_like(tensor, 7) for key, tensor in state.items()}
    dcp.load_state_dict(empty, dcp.FileSystemReader(path), no_dist=True)
    return empty


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(bitwise_equal(one[key], other[key]) for key in one)


def read_all(path: Path) -> dict[str, Tensor]:
    reader = TorchDistReader(path)
    return {key: reader.read(key) for key in reader.tensors}


def test_torch_loads_what_was_written(tmp_path: Path) -> None:
    state, progress = tensors(), []
    write_torch_dist(tmp_path, blocks_of(state), {"iteration": 0}, progress.append)
    assert same(load_with_torch(tmp_path, state), state)
    assert sum(progress) == sum(tensor.nbytes for tensor in state.values()) and len(progress) == 7
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    assert {key: tuple(entry.size) for key, entry in metadata.state_dict_metadata.items()} == {
        key: tuple(tensor.shape) for key, tensor in state.items()
    }


def test_megatron_loads_what_was_written(tmp_path: Path, one_rank: None) -> None:
    state = tensors()
    write(tmp_path, *blocks_of(state))
    state_dict = {key: ShardedTensor.from_rank_offsets(key, torch.empty_like(value)) for key, value in state.items()}
    del state_dict[FC2]
    places = [(layer, rank) for layer in range(4) for rank in range(2)]
    for layer, rank in places:  # as tensor rank `rank` of 2 loads it
        state_dict[f"{layer} {rank}"] = ShardedTensor.from_rank_offsets(
            FC2, torch.empty(8, 3), (0, layer, 4), (2, rank, 2), prepend_axis_num=1
        )
    loaded = dist_checkpointing.load(state_dict, str(tmp_path))
    for layer, rank in places:
        columns = state[FC2][layer, :, rank * 3 : rank * 3 + 3]
        assert torch.equal(loaded[f"{layer} {rank}"].reshape(8, 3), columns)
    assert all(bitwise_equal(loaded[key], state[key]) for key in state if key != FC2)
    assert dist_checkpointing.load_common_state_dict(str(tmp_path)) == {"checkpoint_version": 3.0, "iteration": 0}
    assert dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path))
    assert torch.load(tmp_path / "common.pt", weights_only=True)["iteration"] == 0


def test_what_was_written_is_read_without_a_copy(tmp_path: Path) -> None:
    state = tensors()
    reader = TorchDistReader(write(tmp_path, *blocks_of(state)))
    assert {key: (stored.shape, stored.dtype) for key, stored in reader.tensors.items()} == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()
    }
    assert same({key: reader.read(key) for key in state}, state)
    for layer in range(4):
        assert bitwise_equal(reader.read(FC2, layer), state[FC2][layer])
        assert reader.read(FC2, layer).data_ptr() == reader.read(FC2, layer).data_ptr()


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    state = tensors()
    save_with_torch({**state, "step": 5, "nested": {"a": [torch.ones(2)]}}, tmp_path)
    found = read_all(tmp_path)
    assert same({key: found[key] for key in state}, state)
    assert set(found) - set(state) == {"nested.a.0"}  # numbers are no tensors
    assert bitwise_equal(TorchDistReader(tmp_path).read(FC2, 2), state[FC2][2])


def sharded(key: str, tensor: Tensor, *fragments: int) -> dict[str, ShardedTensor]:
    """`tensor` as Megatron's shards, cut into `fragments` along each axis."""
    parts = [((), tensor)]
    for axis, count in enumerate(fragments):
        parts = [((*at, i), piece) for at, part in parts for i, piece in enumerate(part.chunk(count, axis))]
    return {
        f"{key} {at}": ShardedTensor.from_rank_offsets(
            key, part.contiguous(), *((axis, i, fragments[axis]) for axis, i in enumerate(at))
        )
        for at, part in parts
    }


def test_what_megatron_writes_in_parts_is_read(tmp_path: Path, one_rank: None, no_gpu: None) -> None:
    embedding, norm = torch.randn(12, 8), torch.randn(8)
    layers = torch.randn(4, 8, 6)
    state: dict[str, Any] = {
        **sharded("embedding.word_embeddings.weight", embedding, 3, 2),
        **sharded("decoder.final_layernorm.weight", norm, 1),
        "iteration": 7,
        "extra": ShardedObject("decoder.layers._extra_state", io.BytesIO(b"x"), (1,), (0,)),
    }
    for layer in range(4):  # stacked, divided by columns
        for rank in range(2):
            state[f"fc2 {layer} {rank}"] = ShardedTensor.from_rank_offsets(
                FC2, layers[layer, :, rank * 3 : rank * 3 + 3].contiguous(), (0, layer, 4), (2, rank, 2),
                prepend_axis_num=1,
            )  # fmt: skip
        key = f"decoder.layers.{layer}.mlp.linear_fc1.weight"  # numbered, divided by rows
        state |= sharded(key, layers[layer], 4)
    dist_checkpointing.save(state, str(tmp_path), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
    found = read_all(tmp_path)
    numbered = {f"decoder.layers.{layer}.mlp.linear_fc1.weight": layers[layer] for layer in range(4)}
    assert same(found, {
        "embedding.word_embeddings.weight": embedding, "decoder.final_layernorm.weight": norm, FC2: layers, **numbered,
    })  # fmt: skip
    reader = TorchDistReader(tmp_path)
    assert all(bitwise_equal(reader.read(FC2, layer), layers[layer]) for layer in range(4))


@pytest.mark.parametrize("layers_a_block", [1, 2, 3, 4])
def test_blocks_of_several_layers_are_read(tmp_path: Path, layers_a_block: int) -> None:
    state = torch.randn(4, 5, 6)
    blocks = [
        block(FC2, (4, 5, 6), (first, 0, column), state[first : first + layers_a_block, :, column : column + 4])
        for first in range(0, 4, layers_a_block)
        for column in (0, 4)
    ]
    write(tmp_path, *blocks)
    assert same(load_with_torch(tmp_path, {FC2: state}), {FC2: state})
    reader = TorchDistReader(tmp_path)
    assert bitwise_equal(reader.read(FC2), state)
    assert all(bitwise_equal(reader.read(FC2, layer), state[layer]) for layer in range(4))


def test_missing_blocks_are_reported(tmp_path: Path) -> None:
    state = torch.randn(4, 8, 6)
    present = [block(FC2, (4, 8, 6), (i, 0, column), state[i : i + 1, :, column : column + 3]) for i, column in
               ((0, 0), (0, 3), (1, 3), (3, 0), (3, 3))]  # fmt: skip
    reader = TorchDistReader(write(tmp_path, *present))
    assert bitwise_equal(reader.read(FC2, 3), state[3])
    with pytest.raises(KitError, match=r"linear_fc2\.weight has 24 of 48 elements: the checkpoint is incomplete"):
        reader.read(FC2, 1)
    with pytest.raises(KitError, match=r"linear_fc2\.weight has 0 of 48 elements"):
        reader.read(FC2, 2)
    with pytest.raises(KitError, match=r"linear_fc2\.weight has 120 of 192 elements"):
        reader.read(FC2)


def test_a_missing_or_shortened_data_file_is_reported(tmp_path: Path) -> None:
    state = tensors()
    write(tmp_path, *blocks_of(state))
    data = (tmp_path / "__0_0.distcp").read_bytes()
    (tmp_path / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    reader = TorchDistReader(tmp_path)
    assert bitwise_equal(reader.read("embedding.word_embeddings.weight"), state["embedding.word_embeddings.weight"])
    with pytest.raises(KitError, match=r"__0_0\.distcp is not a complete torch\.save file"):
        reader.read("half")
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(KitError, match=r"__0_0\.distcp cannot be read"):
        TorchDistReader(tmp_path).read("half")


def change(path: Path, edit: Callable[[Any], None]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    edit(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_and_data_that_disagree_are_reported(tmp_path: Path) -> None:
    write(tmp_path, full_shard("a", torch.ones(2)), full_shard("b", torch.ones(3)))
    places = {index.fqn: index for index in pickle.loads((tmp_path / ".metadata").read_bytes()).storage_data}

    def exchange(metadata: Any) -> None:
        data = metadata.storage_data
        data[places["a"]], data[places["b"]] = data[places["b"]], data[places["a"]]

    change(tmp_path, exchange)
    with pytest.raises(KitError, match=r"__0_0\.distcp: the data at byte \d+ does not match the chunk in \.metadata"):
        TorchDistReader(tmp_path).read("a")
    change(tmp_path, lambda metadata: metadata.storage_data.pop(places["a"]))
    with pytest.raises(KitError, match=r"\.metadata has no storage metadata for a at \[0\]: copy it again"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize("name", ["../a/__0_0.distcp", "/etc/passwd", "", ".."])
def test_metadata_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, full_shard("a", torch.ones(2)))
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    (index,) = metadata.storage_data
    metadata.storage_data[index] = replace(metadata.storage_data[index], relative_path=name)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(KitError, match=r"\.metadata names .*, which is not in its folder"):
        TorchDistReader(tmp_path)


def test_overlapping_blocks_are_reported(tmp_path: Path) -> None:
    state = torch.randn(4, 8, 6)
    half = state[:, :4]
    reader = TorchDistReader(
        write(tmp_path, block(FC2, (4, 8, 6), (0, 0, 0), half), block(FC2, (4, 8, 6), (0, 2, 0), half))
    )
    for ask in (lambda: reader.read(FC2), lambda: reader.read(FC2, 1), lambda: reader.check_coverage(FC2)):
        with pytest.raises(KitError, match=r"linear_fc2\.weight has overlapping chunks at"):
            ask()


def test_metadata_that_is_none_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"\.metadata cannot be read"):
        TorchDistReader(tmp_path)
    for value in ({"a": 1}, dcp.Metadata({}, None, None)):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
        with pytest.raises(KitError, match=r"\.metadata holds no metadata of torch\.distributed\.checkpoint"):
            TorchDistReader(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(eval))
    with pytest.raises(KitError, match=r"\.metadata references builtins\.eval"):
        TorchDistReader(tmp_path)


def test_the_metadata_class_of_megatron_core_0_15_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, full_shard("a", torch.arange(6.0)))
    module = ModuleType("megatron.core.dist_checkpointing.strategies.torch")
    fields = {"mcore_data": None, "__module__": module.__name__}
    module.MCoreMetadata = type("MCoreMetadata", (dcp.Metadata,), fields)
    metadata = module.MCoreMetadata(**vars(pickle.loads((tmp_path / ".metadata").read_bytes())))
    metadata.mcore_data = {"a": {}}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert b"MCoreMetadata" in (tmp_path / ".metadata").read_bytes()
    assert torch.equal(TorchDistReader(tmp_path).read("a"), torch.arange(6.0))


def test_damaged_metadata_gives_an_error_that_names_it(tmp_path: Path) -> None:
    write(tmp_path, full_shard("a", torch.ones(2)), block("b", (2, 3), (1, 0), torch.ones(1, 3)))
    data = (tmp_path / ".metadata").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / ".metadata").write_bytes(data[:length])
        with pytest.raises(KitError, match=r"\.metadata cannot be read \(.*\): copy"):
            TorchDistReader(tmp_path)
    refused = 0
    for at in range(0, len(data), 2):
        damaged = bytearray(data)
        damaged[at] ^= 0x80 if at % 4 else 0x01
        (tmp_path / ".metadata").write_bytes(damaged)
        try:
            read_all(tmp_path)  # a name may have another letter
        except KitError as error:
            refused += 1
            assert str(tmp_path) in str(error)
    assert refused > len(data) / 4


def test_the_metadata_is_the_last_to_be_written(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(
            tmp_path,
            full_shard("a", torch.ones(2)),
            TensorShard("b", (2,), (0,), LazyTensor((2,), torch.float32, fail)),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["__0_0.distcp"]
    write_torch_dist(tmp_path, [full_shard("a", torch.ones(2))], {}, lambda size: None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "__0_0.distcp", "common.pt", "metadata.json", "checksums.json", ".metadata",
    }  # fmt: skip
    assert json.loads((tmp_path / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
