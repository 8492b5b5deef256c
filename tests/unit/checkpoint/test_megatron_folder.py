"""Megatron checkpoints put together by hand, of every layout, read as the Hugging Face weights they came from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.formats.megatron_folder import MegatronReader, open_megatron
from common.checkpoint.formats.parallel_layout import model_tensors
from common.errors import KitError
from common.model.shape.config import QwenConfig
from tests.unit.checkpoint.small import bitwise_equal, dist_state, joined, save_with_torch, write_hf, write_ranks

ONE = [[range(4)]]
TWO = [[range(2)], [range(2, 4)]]
WORDS, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def reader(path: Path, qwen: QwenConfig, kind: Literal["torch", "torch_dist"] = "torch") -> MegatronReader:
    return open_megatron(Checkpoint(path.parent, path, "release", kind), qwen)


def hf_weights(found: MegatronReader, qwen: QwenConfig) -> dict[str, Tensor]:
    return {
        name: joined(found.hf_parts(row, layer, part))
        for row, layer in model_tensors(qwen)
        for part, name in enumerate(row.hf_names(layer))
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(bitwise_equal(one[name], other[name]) for name in one)


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits what the file of one rank holds."""
    path = folder / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("stages", "described"),
    [
        (ONE, "PP=1 VPP=1"),
        (TWO, "PP=2 VPP=1"),
        ([[range(1)], [range(1, 3)], [range(3, 4)]], "PP=3 VPP=1"),  # uneven
        ([[range(1, 1)], [range(4)]], "PP=2 VPP=1"),  # a stage of the embedding alone
        ([[range(1), range(2, 3)], [range(1, 2), range(3, 4)]], "PP=2 VPP=2"),
        ([[range(2), range(3, 3)], [range(2, 3), range(3, 4)]], "PP=2 VPP=2"),  # uneven
    ],
)
def test_every_layout_gives_back_the_weights(
    tmp_path: Path, tied: bool, impl: str, tp: int, stages: list[list[range]], described: str
) -> None:
    qwen, weights = write_hf(tmp_path / "hf", tie_word_embeddings=tied)
    found = reader(write_ranks(tmp_path / "release", weights, qwen, stages, tp=tp, impl=impl), qwen)
    assert same(hf_weights(found, qwen), weights)
    assert found.description == f"torch, TP={tp} {described}, {impl} names"


def test_more_than_ten_virtual_chunks_keep_their_order(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf", num_hidden_layers=24)
    stages = [[range(chunk * 2 + stage, chunk * 2 + stage + 1) for chunk in range(12)] for stage in range(2)]
    found = reader(write_ranks(tmp_path / "release", weights, qwen, stages), qwen)
    assert same(hf_weights(found, qwen), weights)


def test_other_entries_of_a_checkpoint_are_skipped(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "iter_0000010", weights, qwen, ONE)

    def add(state: dict[str, Any]) -> None:
        state["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
        state["model"]["rotary_pos_emb.inv_freq"] = torch.ones(2)
        state |= {"optimizer": {"state": {0: torch.ones(3)}}, "rng_state": [torch.get_rng_state()], "num_floating": 1}

    change(path / "mp_rank_00", add)
    assert same(hf_weights(reader(path, qwen), qwen), weights)


def test_the_stored_dtype_is_read(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()} | {"model.norm.weight": torch.ones(8)}
    halves["model.embed_tokens.weight"] = torch.ones(11, 8)
    found = reader(write_ranks(tmp_path / "release", halves, qwen, ONE), qwen)
    dtypes = {row.te: found.dtype(row, layer) for row, layer in model_tensors(qwen)}
    assert dtypes.pop("decoder.final_layernorm.weight") == dtypes.pop(WORDS) == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_vocabulary_padded_further_is_cut_off(tmp_path: Path, kit_log: pytest.LogCaptureFixture) -> None:
    qwen, weights = write_hf(tmp_path / "hf", tie_word_embeddings=True)
    path = write_ranks(tmp_path / "release", weights, qwen, ONE, tp=2)
    padded = torch.cat([weights["model.embed_tokens.weight"], torch.ones(5, 8)])  # 16 rows, not the 12 that TP=2 needs
    for rank in range(2):
        rows = padded[rank * 8 : rank * 8 + 8].clone()
        change(path / f"mp_rank_{rank:02d}", lambda state, rows=rows: state["model"].update({WORDS: rows}))
    assert same(hf_weights(reader(path, qwen), qwen), weights)
    (record,) = kit_log.records
    assert "has 16 rows, config.json has vocab_size=11: the 5 extra rows are padding" in record.getMessage()


@pytest.mark.parametrize("dist", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_above_the_vocabulary_that_hold_values_are_refused(tmp_path: Path, dist: bool, rows: int) -> None:
    qwen, weights = write_hf(tmp_path / "hf", tie_word_embeddings=True)
    padded = torch.cat([weights["model.embed_tokens.weight"], torch.randn(rows, 8)])
    if dist:
        path = save_dist(tmp_path / "release", dist_state(weights, qwen) | {WORDS: padded})
    else:
        path = write_ranks(tmp_path / "release", weights, qwen, ONE)
        change(path / "mp_rank_00", lambda state: state["model"].update({WORDS: padded.clone()}))
    checkpoint = Checkpoint(tmp_path, path, "release", "torch_dist" if dist else "torch")
    message = rf"has {11 + rows} rows, config\.json has vocab_size=11: the {rows} extra rows are neither"
    with pytest.raises(KitError, match=message):
        open_megatron(checkpoint, qwen)
    assert same(hf_weights(open_megatron(checkpoint, qwen, drop_rows=True), qwen), weights)


def test_a_vocabulary_that_is_too_small_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, ONE)
    change(path / "mp_rank_00", lambda state: state["model"].update({HEAD: torch.ones(10, 8)}))
    with pytest.raises(KitError, match=r"output_layer\.weight has shape \[10, 8\], config\.json expects \[11, 8\]"):
        reader(path, qwen)


def test_a_tied_copy_that_differs_is_refused(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf", tie_word_embeddings=True)
    path = write_ranks(tmp_path / "release", weights, qwen, TWO, tp=2)
    change(path / "mp_rank_01_001", lambda state: state["model"][HEAD][2, 2].add_(1))
    with pytest.raises(KitError, match=r"ties the embeddings, but output_layer\.weight differs .*: set tie_word_emb"):
        reader(path, qwen)


def test_norms_that_differ_between_tensor_ranks_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, TWO, tp=2, impl="local")
    assert same(hf_weights(reader(path, qwen), qwen), weights) and not caplog.records
    change(path / "mp_rank_01_000", lambda state: state["model"]["decoder.layers.1.input_layernorm.weight"].add_(1))
    change(path / "mp_rank_01_001", lambda state: state["model"]["decoder.final_layernorm.weight"].add_(1))
    assert same(hf_weights(reader(path, qwen), qwen), weights)  # rank 0's
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and "using TP rank 0's" in warning.getMessage()
    assert (
        "2 norm weights differ between TP ranks (decoder.layers.1.input_layernorm.weight, ...)" in warning.getMessage()
    )


def test_a_missing_folder_or_file_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, TWO, tp=2)
    (path / "mp_rank_00_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(KitError, match=r"mp_rank_00_001/model_optim_rng\.pt cannot be read \(No such file"):
        reader(path, qwen)
    (path / "mp_rank_00_001").rmdir()
    message = r"has TP=2 and PP=2, but lacks mp_rank_00_001: the checkpoint is incomplete; copy it again"
    with pytest.raises(KitError, match=message):
        reader(path, qwen)


def remove(folder: Path) -> None:
    (folder / "model_optim_rng.pt").unlink()
    folder.rmdir()


def test_a_missing_last_stage_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, TWO)
    remove(path / "mp_rank_00_001")
    with pytest.raises(KitError, match=r"lacks decoder\.final_layernorm\.weight, decoder\.layers\.2\..* more: "):
        reader(path, qwen)


def test_a_missing_last_tensor_rank_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, ONE, tp=2)
    remove(path / "mp_rank_01")
    with pytest.raises(KitError, match=r"has shape .*, config\.json expects "):
        reader(path, qwen)


def test_folders_of_two_layouts_and_of_experts_are_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, ONE)
    write_ranks(path, weights, qwen, TWO)
    with pytest.raises(KitError, match=r"holds mp_rank_00_000 beside mp_rank_00: remove the older one"):
        reader(path, qwen)
    path = write_ranks(tmp_path / "experts", weights, qwen, TWO)
    (path / "mp_rank_00_000").rename(path / "mp_rank_00_000_000")
    with pytest.raises(KitError, match=r"mp_rank_00_000_000: expert-parallel or unknown folder"):
        reader(path, qwen)


@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_000"])
def test_missing_and_unknown_tensors_are_reported_for_every_rank(tmp_path: Path, rank: str) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    bias, router = "decoder.layers.1.self_attention.linear_qkv.bias", "decoder.layers.0.mlp.router.weight"
    path = write_ranks(tmp_path / "release", weights, qwen, TWO, tp=2)
    change(path / rank, lambda state: state["model"].pop(bias))
    with pytest.raises(KitError, match=rf"(lacks|unexpected tensors) {bias}"):
        reader(path, qwen)
    path = write_ranks(tmp_path / "other", weights, qwen, TWO, tp=2)
    change(path / rank, lambda state: state["model"].update({router: torch.ones(1)}))
    with pytest.raises(KitError, match=rf"(lacks|unexpected tensors) {router}"):
        reader(path, qwen)


@pytest.mark.parametrize("rank", ["mp_rank_00", "mp_rank_01"])
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.weight", (4, 8), r"\[8, 8\]"),
        ("decoder.layers.0.mlp.linear_fc2.weight", (8, 8), r"\[8, 4\]"),
        ("decoder.final_layernorm.weight", (4,), r"\[8\]"),
    ],
)
def test_a_tensor_of_another_shape_is_reported(
    tmp_path: Path, rank: str, name: str, shape: tuple[int, ...], expected: str
) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, ONE, tp=2)
    change(path / rank, lambda state: state["model"].update({name: torch.ones(shape)}))
    with pytest.raises(KitError, match=rf"{name} has shape .*, config\.json expects {expected}: its config\.json bel"):
        reader(path, qwen)


def test_another_models_config_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, ONE)
    for name, value, message in (
        ("num_hidden_layers", 3, r"unexpected tensors decoder\.layers\.3"),
        ("num_hidden_layers", 5, r"lacks decoder\.layers\.4"),
        ("intermediate_size", 4, "has shape"),
        ("vocab_size", 12, "has shape"),
    ):
        with pytest.raises(KitError, match=message):
            reader(path, write_hf(tmp_path / "other", **{name: value})[0])
    tied, state = write_hf(tmp_path / "tied", tie_word_embeddings=True)
    path = write_ranks(tmp_path / "of_tied", state, tied, ONE)
    with pytest.raises(KitError, match=r"lacks output_layer\.weight"):
        reader(path, qwen)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"args": 1}, "a rank's file holds no 'model'"),
        ({"model": {}, "model0": {}}, "a rank's file holds no 'model'"),
        ({"model": 1}, "its model is no dict with str keys"),
        ([1], "holds no dict"),
    ],
)
def test_files_without_a_model_are_reported(tmp_path: Path, content: Any, message: str) -> None:
    qwen, _ = write_hf(tmp_path / "hf")
    (tmp_path / "release" / "mp_rank_00").mkdir(parents=True)
    torch.save(content, tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(KitError, match=message):
        reader(tmp_path / "release", qwen)


def test_a_stage_without_a_virtual_chunk_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    stages = [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]
    path = write_ranks(tmp_path / "release", weights, qwen, stages)
    change(path / "mp_rank_00_001", lambda state: state.pop("model1"))
    with pytest.raises(KitError, match=r"the file of PP rank 1 has no 'model1': copy it again"):
        reader(path, qwen)


def save_dist(path: Path, state: dict[str, Any]) -> Path:
    save_with_torch(state, path)
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_torch_dist_gives_back_the_weights(tmp_path: Path, tied: bool, stacked: bool) -> None:
    qwen, weights = write_hf(tmp_path / "hf", tie_word_embeddings=tied)
    others = {
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.ones(2),
        "rng_state": torch.ones(3),
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4": torch.ones(1),
    }
    path = save_dist(tmp_path / "release", dist_state(weights, qwen, stacked=stacked) | others)
    found = reader(path, qwen, "torch_dist")
    assert same(hf_weights(found, qwen), weights) and found.description == "torch_dist"


def test_torch_dist_with_a_padded_vocabulary_is_cut_off(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    state = dist_state(weights, qwen)
    for name in (WORDS, HEAD):
        state[name] = torch.cat([state[name], torch.ones(117, 8)])
    assert same(hf_weights(reader(save_dist(tmp_path / "release", state), qwen, "torch_dist"), qwen), weights)


def test_torch_dist_with_a_tied_copy(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf", tie_word_embeddings=True)
    state = dist_state(weights, qwen)
    state[HEAD] = state[WORDS].clone()
    assert same(hf_weights(reader(save_dist(tmp_path / "same", state), qwen, "torch_dist"), qwen), weights)
    state[HEAD][0, 0] += 1
    path = save_dist(tmp_path / "other", state)
    with pytest.raises(KitError, match=r"ties the embeddings, but output_layer\.weight differs"):
        reader(path, qwen, "torch_dist")


def test_torch_dist_of_another_model_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    state = dist_state(weights, qwen)
    bias = "decoder.layers.self_attention.linear_qkv.bias"
    wrong = [
        ({**state, bias: state[bias][:3]}, r"linear_qkv\.bias has shape \[3, 16\], config\.json expects \[4, 16\]"),
        ({**state, bias: state[bias][:, :8]}, r"linear_qkv\.bias has shape \[4, 8\], config\.json expects \[4, 16\]"),
        ({**state, HEAD: torch.ones(10, 8)}, r"output_layer\.weight has shape \[10, 8\], config\.json expects \[11"),
        (
            {**state, "decoder.layers.mlp.router.weight": torch.ones(1)},
            r"unexpected tensors decoder\.layers\.mlp\.router",
        ),
        ({name: tensor for name, tensor in state.items() if name != bias}, r"lacks decoder\.layers\.self_attention\."),
    ]
    for number, (each, message) in enumerate(wrong):
        path = save_dist(tmp_path / str(number), each)
        with pytest.raises(KitError, match=message):
            reader(path, qwen, "torch_dist")
