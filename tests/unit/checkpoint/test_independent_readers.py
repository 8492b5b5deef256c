"""What the verification counts, and what it rejects: casts, copies of norms, padding, blocks of torch_dist."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.verification.verify import verify
from common.errors import KitError
from tests.unit.checkpoint.small import write_hf, write_ranks
from tests.unit.checkpoint.test_verify import TWO, WORDS, Pair, flip


def test_what_a_cast_makes_zero_is_counted(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    weights["model.layers.1.mlp.up_proj.weight"][2, 2:4] = torch.tensor([1e-9, 0.0])
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    write_ranks(tmp_path / "release", {name: tensor.half() for name, tensor in weights.items()}, qwen, TWO)
    checkpoint = Checkpoint(tmp_path, tmp_path / "release", "release", "torch")
    report = verify(tmp_path / "hf", checkpoint, qwen, torch.float16)
    assert report.line().endswith("all bits agree; 1 values became zero in the cast")


def test_a_buffer_of_old_transformers_is_not_a_weight(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    pair.change_hf(lambda weights: weights.update({name: torch.ones(2)}))
    assert (pair.report().errors, pair.report().num_tensors) == ([], len(pair.weights))
    pair.change_hf(lambda weights: weights.update({"model.layers.0.self_attn.inv_freq_proj.weight": torch.ones(2)}))
    assert pair.report().errors


def test_norms_of_other_ranks_are_counted_where_megatron_is_the_source(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    for rank, norm in (("01_000", "input_layernorm"), ("01_001", "pre_mlp_layernorm")):
        name = f"decoder.layers.0.{norm}.weight"
        pair.change_rank(rank, lambda state, name=name: flip(state[name], 3))  # type: ignore[misc]
    assert len(pair.report().errors) == 2
    report = verify(pair.folder, pair.checkpoint, pair.qwen, from_megatron=True)
    assert (report.errors, report.differing_replicas) == ([], 2)
    pair.change_rank("00_000", lambda state: flip(state["decoder.layers.0.pre_mlp_layernorm.weight"], 3))
    pair.change_rank("01_000", lambda state: flip(state["decoder.layers.0.self_attention.linear_qkv.bias"], 3))
    assert len(verify(pair.folder, pair.checkpoint, pair.qwen, from_megatron=True).errors) == 2


@pytest.mark.parametrize("dist", [True, False])
def test_rows_above_the_vocabulary_that_hold_values_are_found(tmp_path: Path, dist: bool) -> None:
    pair = Pair(tmp_path, dist=dist, tp=1)
    for more, is_padding in ((torch.zeros(5, 8), True), (torch.ones(5, 8), True), (torch.randn(5, 8), False)):

        def widen(state: dict[str, Any], more: Tensor = more) -> None:
            state[WORDS] = torch.cat([state[WORDS][:11], more])

        if dist:
            pair.change_dist(widen)
        else:
            pair.change_rank("00_000", widen)
        errors = [] if is_padding else [f"{WORDS} has 5 rows above vocab_size=11 that hold values"]
        assert pair.report().errors == errors
    assert verify(pair.folder, pair.checkpoint, pair.qwen, drop_rows=True).dropped_rows == 5


def split_words(pair: Pair, *blocks: tuple[int, Tensor]) -> None:
    """The embedding as these blocks, each with the row that it begins at."""
    metadata = pickle.loads((pair.path / ".metadata").read_bytes())
    metadata.state_dict_metadata[WORDS].chunks.clear()
    for index in [index for index in metadata.storage_data if index.fqn == WORDS]:
        del metadata.storage_data[index]
    for number, (row, part) in enumerate(blocks):
        offsets, file = torch.Size((row, 0)), pair.path / f"__{number + 7}_0.distcp"
        torch.save(part.clone(), file)
        metadata.state_dict_metadata[WORDS].chunks.append(ChunkStorageMetadata(offsets, part.shape))
        metadata.storage_data[MetadataIndex(WORDS, offsets)] = _StorageInfo(file.name, 0, file.stat().st_size)
    (pair.path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_overlapping_blocks_and_holes_fail_the_verification(tmp_path: Path) -> None:
    pair = Pair(tmp_path, dist=True)
    words = pair.weights["model.embed_tokens.weight"]
    split_words(pair, (0, words[:4]), (4, words[4:9]), (9, words[9:]))
    assert not pair.report().errors
    split_words(pair, (0, words[:6]), (5, words[5:10]))
    with pytest.raises(KitError, match=rf"{WORDS}: 16 elements are in no chunk or in more than one"):
        pair.report()
    split_words(pair, (0, words[:6]), (0, words[:6]))
    with pytest.raises(KitError, match=WORDS):
        pair.report()
