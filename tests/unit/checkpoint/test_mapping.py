"""The mapping table against layouts written by hand: which rows are where, on which tensor rank, under which name."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from common.checkpoint.formats.mapping import (
    EMBEDDING,
    OUTPUT,
    PARAM_MAPPINGS,
    ParamMapping,
    canonical_name,
    check_names,
    hf_shape,
    implementation_of,
    is_skipped,
    megatron_shape,
    merge,
    param_mappings,
    rename_parameters,
    shard,
    split,
    unshard,
)
from common.errors import KitError
from common.model.shape.config import QwenConfig
from tests.unit.checkpoint.small import QWEN, joined

# Hugging Face's names and Megatron-Core's, with Transformer Engine and without, for layer 3.
NAMES = {
    "model.embed_tokens.weight": ("embedding.word_embeddings.weight",) * 2,
    "model.layers.3.input_layernorm.weight": (
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.3.input_layernorm.weight",
    ),
    "model.layers.3.self_attn.q_proj.weight": ("decoder.layers.3.self_attention.linear_qkv.weight",) * 2,
    "model.layers.3.self_attn.k_proj.weight": ("decoder.layers.3.self_attention.linear_qkv.weight",) * 2,
    "model.layers.3.self_attn.v_proj.weight": ("decoder.layers.3.self_attention.linear_qkv.weight",) * 2,
    "model.layers.3.self_attn.q_proj.bias": ("decoder.layers.3.self_attention.linear_qkv.bias",) * 2,
    "model.layers.3.self_attn.k_proj.bias": ("decoder.layers.3.self_attention.linear_qkv.bias",) * 2,
    "model.layers.3.self_attn.v_proj.bias": ("decoder.layers.3.self_attention.linear_qkv.bias",) * 2,
    "model.layers.3.self_attn.q_norm.weight": ("decoder.layers.3.self_attention.q_layernorm.weight",) * 2,
    "model.layers.3.self_attn.k_norm.weight": ("decoder.layers.3.self_attention.k_layernorm.weight",) * 2,
    "model.layers.3.self_attn.o_proj.weight": ("decoder.layers.3.self_attention.linear_proj.weight",) * 2,
    "model.layers.3.post_attention_layernorm.weight": (
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
    ),
    "model.layers.3.mlp.gate_proj.weight": ("decoder.layers.3.mlp.linear_fc1.weight",) * 2,
    "model.layers.3.mlp.up_proj.weight": ("decoder.layers.3.mlp.linear_fc1.weight",) * 2,
    "model.layers.3.mlp.down_proj.weight": ("decoder.layers.3.mlp.linear_fc2.weight",) * 2,
    "model.norm.weight": ("decoder.final_layernorm.weight",) * 2,
    "lm_head.weight": ("output_layer.weight",) * 2,
}


def row(end: str) -> ParamMapping:
    """The row whose Transformer Engine name ends with `end`."""
    (found,) = [row for row in PARAM_MAPPINGS if row.te.endswith(end)]
    return found


def rows(*numbers: int, columns: int = 4) -> Tensor:
    """A matrix whose row of number k is k.0, k.1, k.2, ..."""
    return torch.tensor([[k + column / 10 for column in range(columns)] for k in numbers])


def merged_tensor(row: ParamMapping, parts: Sequence[Tensor], qwen: QwenConfig) -> Tensor:
    """The Megatron tensor of these parts."""
    return torch.cat(merge(row, parts, qwen))


def at_rank(row: ParamMapping, parts: Sequence[Tensor], qwen: QwenConfig, tp_rank: int, tp: int) -> Tensor:
    """The Megatron tensor of one tensor rank."""
    vocabulary_rows = qwen.padded_vocab_size(tp)
    return merged_tensor(row, [shard(row, part, tp_rank, tp, vocabulary_rows) for part in parts], qwen)


def test_names_are_those_of_either_implementation() -> None:
    found = {
        name: (row.megatron_name("transformer_engine", 3), row.megatron_name("local", 3))
        for row in PARAM_MAPPINGS
        for name in row.hf_names(3)
    }
    assert found == NAMES


def test_only_an_untied_model_has_an_output_layer() -> None:
    tied = param_mappings(replace(QWEN, tie_word_embeddings=True))
    assert param_mappings(QWEN) == (*tied, OUTPUT) and EMBEDDING in tied


def test_queries_keys_and_values_are_interleaved_by_group() -> None:
    q, k, v = rows(0, 1, 2, 3), rows(10, 11), rows(20, 21)
    fused = merged_tensor(row("linear_qkv.weight"), [q, k, v], QWEN)
    assert torch.equal(fused, rows(0, 1, 10, 20, 2, 3, 11, 21))
    biases = [torch.tensor(part) for part in ([0, 1, 2, 3], [10, 11], [20, 21])]
    assert merged_tensor(row("linear_qkv.bias"), biases, QWEN).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [torch.cat(part).tolist() for part in split(row("linear_qkv.bias"), torch.arange(8), QWEN)] == [
        [0, 1, 4, 5], [2, 6], [3, 7],
    ]  # fmt: skip


def test_the_rows_of_a_head_stay_together() -> None:
    qwen = replace(QWEN, head_dim=2)
    biases = [torch.tensor(part) for part in ([0, 1, 2, 3, 4, 5, 6, 7], [10, 11, 12, 13], [20, 21, 22, 23])]
    expected = [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert merged_tensor(row("linear_qkv.bias"), biases, qwen).tolist() == expected


def test_a_tensor_rank_takes_whole_groups() -> None:
    parts = [rows(0, 1, 2, 3), rows(10, 11), rows(20, 21)]
    assert torch.equal(at_rank(row("linear_qkv.weight"), parts, QWEN, 0, 2), rows(0, 1, 10, 20))
    assert torch.equal(at_rank(row("linear_qkv.weight"), parts, QWEN, 1, 2), rows(2, 3, 11, 21))


def test_gate_and_up_are_divided_each() -> None:
    parts = [rows(0, 1, 2, 3), rows(10, 11, 12, 13)]
    fc1 = row("linear_fc1.weight")
    assert torch.equal(merged_tensor(fc1, parts, QWEN), rows(0, 1, 2, 3, 10, 11, 12, 13))
    assert torch.equal(at_rank(fc1, parts, QWEN, 0, 2), rows(0, 1, 10, 11))
    assert torch.equal(at_rank(fc1, parts, QWEN, 1, 2), rows(2, 3, 12, 13))
    assert all(
        torch.equal(torch.cat(one), other)
        for one, other in zip(split(fc1, rows(2, 3, 12, 13), QWEN), [rows(2, 3), rows(12, 13)], strict=True)
    )


@pytest.mark.parametrize("end", ["linear_proj.weight", "linear_fc2.weight"])
def test_projections_back_are_divided_by_columns(end: str) -> None:
    full = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])
    assert at_rank(row(end), [full], QWEN, 0, 2).tolist() == [[0, 1], [10, 11]]
    assert at_rank(row(end), [full], QWEN, 1, 2).tolist() == [[2, 3], [12, 13]]


@pytest.mark.parametrize(
    "end", ["linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight", "final_layernorm.weight"]
)
def test_norms_are_replicated_on_every_rank(end: str) -> None:
    norm = torch.tensor([1.0, 2, 3, 4])
    assert [at_rank(row(end), [norm], QWEN, rank, 4).tolist() for rank in range(4)] == [[1, 2, 3, 4]] * 4
    assert joined(unshard(row(end), [norm, norm + 1], 0, QWEN)).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("vocabulary", [EMBEDDING, OUTPUT])
def test_the_vocabulary_is_padded_with_zeros_to_what_tp_divides(vocabulary: ParamMapping) -> None:
    words = rows(1, 2, 3, 4, 5)
    nothing = torch.zeros(1, 4)
    assert torch.equal(at_rank(vocabulary, [words], QWEN, 0, 1), words)
    assert torch.equal(at_rank(vocabulary, [words], QWEN, 0, 2), rows(1, 2, 3))
    assert torch.equal(at_rank(vocabulary, [words], QWEN, 1, 2), torch.cat([rows(4, 5), nothing]))
    four = [at_rank(vocabulary, [words], QWEN, rank, 4) for rank in range(4)]
    assert torch.equal(four[2], torch.cat([rows(5), nothing])) and torch.equal(four[3], torch.zeros(2, 4))
    assert torch.equal(joined(unshard(vocabulary, four, 0, QWEN)), words)
    assert torch.equal(shard(vocabulary, words, 1, 2, 8), torch.cat([rows(5), torch.zeros(3, 4)]))


def test_what_is_not_padded_is_a_view() -> None:
    words, matrix = rows(1, 2, 3, 4, 5, 6), rows(1, 2)
    assert shard(EMBEDDING, words, 1, 2, 6).untyped_storage().data_ptr() == words.untyped_storage().data_ptr()
    assert shard(row("linear_proj.weight"), matrix, 1, 2, 6)._base is matrix


@settings(max_examples=60, deadline=None)
@given(
    tp=st.integers(1, 4), groups=st.integers(1, 3), queries=st.integers(1, 4), head_dim=st.integers(1, 3),
    ffn=st.integers(1, 3), vocab_size=st.integers(1, 30), part=st.sampled_from(PARAM_MAPPINGS), seed=st.integers(0, 99),
)  # fmt: skip
def test_dividing_and_joining_give_back_every_tensor(
    tp: int, groups: int, queries: int, head_dim: int, ffn: int, vocab_size: int, part: ParamMapping, seed: int
) -> None:
    heads = tp * groups * queries
    qwen = replace(
        QWEN, num_key_value_heads=tp * groups, num_attention_heads=heads, head_dim=head_dim,
        hidden_size=heads * head_dim, intermediate_size=tp * ffn, vocab_size=vocab_size,
    )  # fmt: skip
    torch.manual_seed(seed)
    tensors = [torch.randn(hf_shape(name, qwen)) for name in part.hf_names(0)]
    merged = merged_tensor(part, tensors, qwen)
    assert all(
        torch.equal(torch.cat(one), other) for one, other in zip(split(part, merged, qwen), tensors, strict=True)
    )
    shards = [at_rank(part, tensors, qwen, rank, tp) for rank in range(tp)]
    assert {tuple(each.shape) for each in shards} == {megatron_shape(part, qwen, tp)}
    for index, tensor in enumerate(tensors):
        assert torch.equal(joined(unshard(part, shards, index, qwen)), tensor)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_shapes_are_those_of_transformers(tied: bool, family: str) -> None:
    qwen = replace(
        QWEN, hidden_size=12, intermediate_size=10, num_attention_heads=6, head_dim=2, vocab_size=7,
        tie_word_embeddings=tied,
    )  # fmt: skip
    shape = {
        "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 7, "tie_word_embeddings": tied,
    }  # fmt: skip
    with torch.device("meta"):
        if family == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**shape))
        else:
            qwen = replace(qwen, head_dim=8, qkv_bias=False, qk_norm=True)
            model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    layers = {row: range(2) if row.stage == "layer" else [None] for row in param_mappings(qwen)}
    ours = {name: hf_shape(name, qwen) for row, found in layers.items() for i in found for name in row.hf_names(i)}
    assert ours == theirs


def test_megatron_shapes() -> None:
    qwen = replace(QWEN, hidden_size=12, intermediate_size=10, num_attention_heads=6, head_dim=2, vocab_size=7)
    shapes = {
        row.te.rpartition("{i}.")[2]: (megatron_shape(row, qwen), megatron_shape(row, qwen, 2))
        for row in PARAM_MAPPINGS
    }
    assert shapes == {
        "embedding.word_embeddings.weight": ((7, 12), (4, 12)),
        "self_attention.linear_qkv.layer_norm_weight": ((12,), (12,)),
        "self_attention.linear_qkv.weight": ((20, 12), (10, 12)),  # 6 queries, 2 keys, 2 values of 2 rows
        "self_attention.linear_qkv.bias": ((20,), (10,)),
        "self_attention.q_layernorm.weight": ((2,), (2,)),
        "self_attention.k_layernorm.weight": ((2,), (2,)),
        "self_attention.linear_proj.weight": ((12, 12), (12, 6)),
        "mlp.linear_fc1.layer_norm_weight": ((12,), (12,)),
        "mlp.linear_fc1.weight": ((20, 12), (10, 12)),
        "mlp.linear_fc2.weight": ((12, 10), (12, 5)),
        "decoder.final_layernorm.weight": ((12,), (12,)),
        "output_layer.weight": ((7, 12), (4, 12)),
    }
    assert megatron_shape(EMBEDDING, qwen, 2, vocabulary_rows=128) == (64, 12)


def test_parameters_are_renamed_both_ways() -> None:
    te = {names[0]: i for i, names in enumerate(NAMES.values())}
    local = {names[1]: te[names[0]] for names in NAMES.values()}
    assert te != local
    assert rename_parameters(te, "local") == local and rename_parameters(local, "transformer_engine") == te
    assert rename_parameters(te, "transformer_engine") == te and rename_parameters(local, "local") == local
    assert list(rename_parameters(te, "local")) == list(local)  # in their order


def test_renaming_keeps_layers_prefixes_and_other_keys() -> None:
    state = {"module.decoder.layers.17.pre_mlp_layernorm.weight": 1, "optimizer": 2, "decoder.layers.0.mlp.x": 3}
    renamed = rename_parameters(state, "transformer_engine")
    assert renamed == {
        "module.decoder.layers.17.mlp.linear_fc1.layer_norm_weight": 1, "optimizer": 2, "decoder.layers.0.mlp.x": 3,
    }  # fmt: skip
    assert rename_parameters(renamed, "local") == state
    assert canonical_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"


def test_the_implementation_is_recognized_by_the_names() -> None:
    te, local = zip(*NAMES.values(), strict=True)
    assert implementation_of(te) == "transformer_engine" and implementation_of(local) == "local"
    assert implementation_of([]) == "transformer_engine"


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv._extra_state",
        "decoder.layers.0.self_attention.core_attention._extra_state0",
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4",
        "output_layer._extra_state",
        "rotary_pos_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ],
)
def test_entries_without_weights_are_skipped(name: str) -> None:
    assert is_skipped(name)
    check_names([name, "a"], ["a"], "here")


def test_weights_are_not_skipped() -> None:
    names = {*NAMES, *(name for names in NAMES.values() for name in names), "x._extra_state.weight"}
    assert not any(map(is_skipped, names))


def test_missing_and_unknown_names_are_reported() -> None:
    with pytest.raises(KitError, match=r"^here lacks b, c: its config.json belongs to another model"):
        check_names(["a"], ["c", "a", "b"], "here")
    with pytest.raises(KitError, match=r"^here holds unexpected tensors d0, d1, d2, d3, d4 and 2 more: "):
        check_names(["a", *(f"d{i}" for i in range(7))], ["a"], "here")
