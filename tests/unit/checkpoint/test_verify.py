"""The verification: its own mapping of each layout against ones written by hand, and mutants that it must find."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.verification.independent_mapping import slices
from common.checkpoint.verification.report import Report
from common.checkpoint.verification.verify import verify
from common.model.shape.config import QwenConfig
from tests.unit.checkpoint import small
from tests.unit.checkpoint.small import dist_state, save_with_torch, write_hf, write_ranks

QWEN = replace(small.QWEN, num_hidden_layers=9)
QWEN3 = {"model_type": "qwen3", "head_dim": 4}
TWO = [[range(2)], [range(2, 4)]]
STAGES = [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]
QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv.", "decoder.layers.0.mlp.linear_fc1."
WORDS = "embedding.word_embeddings.weight"


def source_rows(name: str, tp_rank: int, tp: int, num_rows: int, qwen: QwenConfig = QWEN) -> list[str]:
    """For each row of a Megatron tensor the Hugging Face row that is there: `q3`, and its columns if not all."""
    rows = ["-"] * num_rows
    for piece in slices(name, tp_rank, tp, qwen, num_rows):
        short = piece.name.replace("_proj", "").removeprefix("model.").removeprefix("layers.8.").rpartition(".")[0]
        columns = f"[{piece.columns.start}:{piece.columns.stop}]" if piece.columns else ""
        for i, number in enumerate(piece.rows):
            assert rows[piece.row + i] == "-"
            rows[piece.row + i] = f"{short.rpartition('.')[2]}{number}{columns}"
    return rows


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_slices_of_attention(kind: str) -> None:
    name = f"decoder.layers.8.self_attention.linear_qkv.{kind}"
    assert source_rows(name, 0, 1, 8) == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    assert source_rows(name, 0, 2, 4) == ["q0", "q1", "k0", "v0"]
    assert source_rows(name, 1, 2, 4) == ["q2", "q3", "k1", "v1"]
    wide = replace(QWEN, head_dim=2, num_attention_heads=2)
    assert source_rows(name, 1, 2, 6, wide) == ["q2", "q3", "k2", "k3", "v2", "v3"]
    names = {piece.name for piece in slices(name, 0, 1, QWEN, 8)}
    assert names == {f"model.layers.8.self_attn.{part}_proj.{kind}" for part in "qkv"}


def test_slices_of_the_mlp() -> None:
    name = "decoder.layers.8.mlp.linear_fc1.weight"
    assert source_rows(name, 0, 1, 8) == ["gate0", "gate1", "gate2", "gate3", "up0", "up1", "up2", "up3"]
    assert source_rows(name, 0, 2, 4) == ["gate0", "gate1", "up0", "up1"]
    assert source_rows(name, 1, 2, 4) == ["gate2", "gate3", "up2", "up3"]
    assert {piece.name for piece in slices(name, 0, 1, QWEN, 8)} == {
        "model.layers.8.mlp.gate_proj.weight", "model.layers.8.mlp.up_proj.weight",
    }  # fmt: skip


def test_slices_of_projections_back_are_columns() -> None:
    assert source_rows("decoder.layers.8.mlp.linear_fc2.weight", 1, 2, 4) == [f"down{row}[2:4]" for row in range(4)]
    assert source_rows("decoder.layers.8.self_attention.linear_proj.weight", 0, 2, 4) == [
        f"o{row}[0:2]" for row in range(4)
    ]
    wide = replace(QWEN, intermediate_size=12, head_dim=3)
    assert source_rows("decoder.layers.8.mlp.linear_fc2.weight", 1, 4, 4, wide) == [
        f"down{row}[3:6]" for row in range(4)
    ]
    name = "decoder.layers.8.self_attention.linear_proj.weight"
    assert source_rows(name, 1, 2, 4, wide) == [f"o{row}[6:12]" for row in range(4)]


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("decoder.layers.8.input_layernorm.weight", "layers.8.input_layernorm"),
        ("decoder.layers.8.self_attention.linear_qkv.layer_norm_weight", "layers.8.input_layernorm"),
        ("decoder.layers.8.pre_mlp_layernorm.weight", "layers.8.post_attention_layernorm"),
        ("decoder.layers.8.mlp.linear_fc1.layer_norm_weight", "layers.8.post_attention_layernorm"),
        ("decoder.final_layernorm.weight", "norm"),
    ],
)
def test_slices_of_norms_are_the_full_tensors(name: str, norm: str) -> None:
    for tp_rank in range(2):
        (piece,) = slices(name, tp_rank, 2, QWEN, 4)
        assert piece == (f"model.{norm}.weight", range(4), None, 0)


def test_slices_of_the_vocabulary_leave_padding_out() -> None:
    assert source_rows(WORDS, 0, 1, 5) == [f"embed_tokens{row}" for row in range(5)]
    assert source_rows(WORDS, 1, 2, 3) == ["embed_tokens3", "embed_tokens4", "-"]
    assert source_rows(WORDS, 3, 4, 2) == ["-", "-"]
    assert source_rows("output_layer.weight", 1, 2, 3) == ["lm_head3", "lm_head4", "-"]
    tied = replace(QWEN, tie_word_embeddings=True)
    assert source_rows("output_layer.weight", 0, 2, 3, tied) == ["embed_tokens0", "embed_tokens1", "embed_tokens2"]


@pytest.mark.parametrize("part", ["q", "k"])
def test_slices_of_qwen3s_head_norms_are_the_full_tensors(part: str) -> None:
    qwen3 = replace(QWEN, head_dim=3, qkv_bias=False, qk_norm=True)
    (piece,) = slices(f"decoder.layers.8.self_attention.{part}_layernorm.weight", 1, 2, qwen3, 3)
    assert piece == (f"model.layers.8.self_attn.{part}_norm.weight", range(3), None, 0)


class Pair:
    """A Hugging Face folder and a Megatron checkpoint of the same weights."""

    def __init__(self, root: Path, *, dist: bool = False, tp: int = 2, **shape: int | bool | str) -> None:
        self.folder, self.path = root / "hf", root / "release"
        self.qwen, self.weights = write_hf(self.folder, **shape)
        if dist:
            self.state = dist_state(self.weights, self.qwen)
            save_with_torch(self.state, self.path)
        else:
            write_ranks(self.path, self.weights, self.qwen, STAGES, tp=tp, impl="local")
        self.checkpoint = Checkpoint(root, self.path, "release", "torch_dist" if dist else "torch")

    def report(self, dtype: torch.dtype | None = None) -> Report:
        return verify(self.folder, self.checkpoint, self.qwen, dtype)

    def change_rank(self, rank: str, edit: Callable[[dict[str, Any]], Any], chunk: str = "model0") -> None:
        path = self.path / f"mp_rank_{rank}" / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)
        edit(state[chunk])
        torch.save(state, path)

    def change_dist(self, edit: Callable[[dict[str, Tensor]], Any]) -> None:
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        edit(state)
        save_with_torch(state, self.path)

    def change_hf(self, edit: Callable[[dict[str, Tensor]], Any]) -> None:
        weights = load_file(self.folder / "model.safetensors")
        edit(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, self.folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dist", [True, False])
@pytest.mark.parametrize("family", [{}, QWEN3])
def test_the_same_weights_agree(tmp_path: Path, tied: bool, dist: bool, family: dict[str, Any]) -> None:
    pair = Pair(tmp_path, dist=dist, tie_word_embeddings=tied, **family)
    report = pair.report()
    num_bytes = sum(tensor.nbytes for tensor in pair.weights.values())
    assert (report.errors, report.num_tensors, report.num_bytes) == ([], len(pair.weights), num_bytes)
    assert report.line() == f"{len(pair.weights)} tensors, 0.00 GB: all bits agree"
    assert (report.non_finite, pair.report(torch.bfloat16).errors) == (0, [])


def test_numbered_layers_and_a_layout_of_one_file_agree(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf", num_hidden_layers=2)
    save_with_torch(dist_state(weights, qwen, stacked=False), tmp_path / "a")
    write_ranks(tmp_path / "b", weights, qwen, [[range(2)]])
    assert not verify(tmp_path / "hf", Checkpoint(tmp_path, tmp_path / "a", "release", "torch_dist"), qwen).errors
    assert not verify(tmp_path / "hf", Checkpoint(tmp_path, tmp_path / "b", "release", "torch"), qwen).errors


def test_more_than_ten_virtual_chunks_agree(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf", num_hidden_layers=24)
    stages = [[range(chunk * 2 + stage, chunk * 2 + stage + 1) for chunk in range(12)] for stage in range(2)]
    write_ranks(tmp_path / "release", weights, qwen, stages)
    checkpoint = Checkpoint(tmp_path, tmp_path / "release", "release", "torch")
    assert not verify(tmp_path / "hf", checkpoint, qwen).errors


def swap(tensor: Tensor, one: slice, other: slice) -> None:
    tensor[one], tensor[other] = tensor[other].clone(), tensor[one].clone()


def flip(tensor: Tensor, bit: int) -> None:
    """One bit of one element, in the middle of the tensor."""
    flat = tensor.view(-1)[tensor.numel() // 2 :].view(torch.int32)
    flat[0] ^= 1 << bit


def exchange(state: dict[str, Any], one: str, other: str) -> None:
    state[one], state[other] = state[other], state[one]


# Layer 0 is in chunk model0 of stage 0, d = 2 rows a head, one group of two queries a tensor rank.
RANK_MUTANTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "two query heads swapped": lambda state: swap(state[QKV + "weight"], slice(0, 2), slice(2, 4)),
    "key and value swapped": lambda state: swap(state[QKV + "weight"], slice(4, 6), slice(6, 8)),
    "two rows of a head swapped": lambda state: swap(state[QKV + "weight"], slice(0, 1), slice(1, 2)),
    "a bias zeroed": lambda state: state[QKV + "bias"].zero_(),
    "a bias of two heads swapped": lambda state: swap(state[QKV + "bias"], slice(0, 2), slice(2, 4)),
    "gate and up exchanged": lambda state: swap(state[FC1 + "weight"], slice(0, 4), slice(4, 8)),
    "columns shifted": lambda state: state["decoder.layers.0.mlp.linear_fc2.weight"].copy_(
        state["decoder.layers.0.mlp.linear_fc2.weight"].roll(1, 1)
    ),
    "output projection transposed": lambda state: state["decoder.layers.0.self_attention.linear_proj.weight"].copy_(
        state["decoder.layers.0.self_attention.linear_proj.weight"].reshape(4, 8).t().clone()
    ),
    "the layer's two norms exchanged": lambda state: exchange(
        state, "decoder.layers.0.input_layernorm.weight", "decoder.layers.0.pre_mlp_layernorm.weight"
    ),
    "the lowest bit flipped": lambda state: flip(state[FC1 + "weight"], 0),
    "the sign flipped": lambda state: flip(state[QKV + "bias"], 31),
    "a row of the vocabulary shifted": lambda state: state[WORDS].copy_(state[WORDS].roll(1, 0)),
    "the vocabulary's first row lost": lambda state: state.update({WORDS: state[WORDS][1:].clone()}),
    "a weight missing": lambda state: state.pop(QKV + "weight"),
    "a norm missing": lambda state: state.pop("decoder.layers.0.pre_mlp_layernorm.weight"),
    "rows too many": lambda state: state.update({QKV + "bias": torch.cat([state[QKV + "bias"], torch.zeros(2)])}),
    "rows too few": lambda state: state.update({QKV + "weight": state[QKV + "weight"][:-2].clone()}),
    "another dtype": lambda state: state.update({QKV + "bias": state[QKV + "bias"].double()}),
}


@pytest.mark.parametrize("rank", ["00_000", "01_000"])
@pytest.mark.parametrize("mutant", RANK_MUTANTS)
def test_a_mutant_of_one_ranks_file_is_found(tmp_path: Path, mutant: str, rank: str) -> None:
    pair = Pair(tmp_path)
    pair.change_rank(rank, RANK_MUTANTS[mutant])
    assert pair.report().errors


@pytest.mark.parametrize("rank", ["00", "01"])
def test_mutants_across_layers_and_stages_are_found(tmp_path: Path, rank: str) -> None:
    pair = Pair(tmp_path)
    norm = "decoder.layers.0.input_layernorm.weight"
    neighbour = pair.weights["model.layers.1.input_layernorm.weight"]
    pair.change_rank(f"{rank}_000", lambda state: state.update({norm: neighbour.clone()}))
    assert pair.report().errors == [f"{norm} of TP rank {int(rank)} differs from model.layers.0.input_layernorm.weight"]
    pair = Pair(tmp_path / "exchanged")
    path = pair.path / f"mp_rank_{rank}_000" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    for name in [name for name in state["model1"] if "layers.0" in name]:
        state["model0"][name], state["model1"][name] = state["model1"][name], state["model0"][name]
    torch.save(state, path)
    assert len(pair.report().errors) >= 14


@pytest.mark.parametrize("part", ["q", "k"])
def test_a_head_norm_of_qwen3_that_differs_is_found(tmp_path: Path, part: str) -> None:
    pair = Pair(tmp_path, **QWEN3)
    name = f"decoder.layers.0.self_attention.{part}_layernorm.weight"
    pair.change_rank("01_000", lambda state: flip(state[name], 3))
    assert pair.report().errors == [f"{name} of TP rank 1 differs from model.layers.0.self_attn.{part}_norm.weight"]
    pair.change_rank("01_000", lambda state: state.pop(name))
    assert len(pair.report().errors) == 1


def test_a_tied_copy_that_differs_is_found(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tie_word_embeddings=True)
    pair.change_rank("01_001", lambda state: flip(state["output_layer.weight"], 3), "model1")
    assert pair.report().errors == ["output_layer.weight of TP rank 1 differs from model.embed_tokens.weight"]


DIST_MUTANTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "two layers swapped": lambda state: swap(
        state["decoder.layers.self_attention.linear_qkv.weight"], slice(1, 2), slice(2, 3)
    ),
    "one bit flipped": lambda state: flip(state["decoder.layers.mlp.linear_fc2.weight"], 7),
    "norms of the layers shifted": lambda state: state["decoder.layers.mlp.linear_fc1.layer_norm_weight"].copy_(
        state["decoder.layers.mlp.linear_fc1.layer_norm_weight"].roll(1, 0)
    ),
    "gate and up exchanged": lambda state: swap(
        state["decoder.layers.mlp.linear_fc1.weight"][3], slice(0, 8), slice(8, 16)
    ),
    "output layer missing": lambda state: state.pop("output_layer.weight"),
    "output layer is the embedding": lambda state: state["output_layer.weight"].copy_(state[WORDS]),
    "vocabulary cut": lambda state: state.update({WORDS: state[WORDS][:-1]}),
}


@pytest.mark.parametrize("mutant", DIST_MUTANTS)
def test_a_mutant_of_a_torch_dist_checkpoint_is_found(tmp_path: Path, mutant: str) -> None:
    pair = Pair(tmp_path, dist=True)
    pair.change_dist(DIST_MUTANTS[mutant])
    assert pair.report().errors


HF_MUTANTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a query head moved": lambda weights: weights["model.layers.3.self_attn.q_proj.weight"].copy_(
        weights["model.layers.3.self_attn.q_proj.weight"].roll(2, 0)
    ),
    "gate and up exchanged": lambda weights: exchange(
        weights, "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    ),
    "one bit flipped": lambda weights: flip(weights["model.norm.weight"], 0),
    "a tensor that Megatron has not": lambda weights: weights.update({"model.layers.4.norm.weight": torch.ones(2)}),
    "another dtype": lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].half()}),
}


@pytest.mark.parametrize("mutant", HF_MUTANTS)
def test_a_mutant_of_the_hugging_face_side_is_found(tmp_path: Path, mutant: str) -> None:
    pair = Pair(tmp_path)
    pair.change_hf(HF_MUTANTS[mutant])
    assert pair.report().errors


def test_bits_are_compared_not_values(tmp_path: Path) -> None:
    pair = Pair(tmp_path)

    def put(value: float) -> Callable[[dict[str, Any]], Any]:
        return lambda state: state["decoder.layers.0.mlp.linear_fc2.weight"].view(-1)[:1].fill_(value)

    pair.change_hf(lambda weights: weights["model.layers.0.mlp.down_proj.weight"].view(-1)[:1].fill_(float("nan")))
    assert pair.report().errors
    pair.change_rank("00_000", put(float("nan")))
    report = pair.report()
    assert (report.errors, report.non_finite) == ([], 1)
    assert report.line().endswith("all bits agree; 1 values are NaN or infinite")
    pair.change_hf(lambda weights: weights["model.layers.0.mlp.down_proj.weight"].view(-1)[:1].fill_(0.0))
    pair.change_rank("00_000", put(-0.0))
    assert len(pair.report().errors) == 1 and pair.report().line().endswith("1 differences")


def test_a_cast_is_compared_after_it(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    halves = {name: tensor.half() for name, tensor in weights.items()}
    write_ranks(tmp_path / "release", halves, qwen, TWO)
    checkpoint = Checkpoint(tmp_path, tmp_path / "release", "release", "torch")
    assert len(verify(tmp_path / "hf", checkpoint, qwen).errors) > len(weights) / 2
    assert not verify(tmp_path / "hf", checkpoint, qwen, torch.float16).errors
    halves["model.norm.weight"][0] *= 1.001
    write_ranks(tmp_path / "release", halves, qwen, TWO)
    assert len(verify(tmp_path / "hf", checkpoint, qwen, torch.float16).errors) == 1


def test_what_a_cast_makes_infinite_is_counted(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    weights["model.layers.1.mlp.up_proj.weight"][2, 2] = 1e6  # float16 ends at 65504
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    write_ranks(tmp_path / "release", {name: tensor.half() for name, tensor in weights.items()}, qwen, TWO)
    checkpoint = Checkpoint(tmp_path, tmp_path / "release", "release", "torch")
    report = verify(tmp_path / "hf", checkpoint, qwen, torch.float16)
    errors = ["model.layers.1.mlp.up_proj.weight: 1 values overflow float16"]
    assert (report.errors, report.non_finite) == (errors, 1)
