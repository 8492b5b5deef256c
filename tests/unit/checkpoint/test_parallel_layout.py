"""Which layers are on which rank, written out by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from common.checkpoint.formats.mapping import EMBEDDING, OUTPUT
from common.checkpoint.formats.parallel_layout import ParallelLayout, chunk_tensors, model_chunks, model_tensors
from common.errors import KitError
from common.model.shape.config import QwenConfig
from tests.unit.checkpoint import small

QWEN = replace(small.QWEN, hidden_size=8, intermediate_size=8, num_hidden_layers=8, vocab_size=10, head_dim=2)
TIED = replace(QWEN, tie_word_embeddings=True)
QWEN3 = replace(QWEN, head_dim=4, qkv_bias=False, qk_norm=True)
LAYER = [
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
]


def layers_of_chunks(
    pp: int, vpp: int, layers: int = 8, each: tuple[int, ...] = ()
) -> dict[tuple[int, str], list[int]]:
    """(pipeline rank, chunk's key) to its layers."""
    found = model_chunks(replace(QWEN, num_hidden_layers=layers), ParallelLayout(1, pp, vpp, "local", each))
    return {(chunk.pp_rank, chunk.key): list(chunk.layers) for chunk in found}


def test_stages_follow_one_another() -> None:
    assert layers_of_chunks(1, 1, layers=3) == {(0, "model"): [0, 1, 2]}
    assert layers_of_chunks(4, 1) == {
        (0, "model"): [0, 1],
        (1, "model"): [2, 3],
        (2, "model"): [4, 5],
        (3, "model"): [6, 7],
    }


def test_virtual_chunks_go_round_the_stages() -> None:
    assert layers_of_chunks(2, 2) == {
        (0, "model0"): [0, 1], (1, "model0"): [2, 3],
        (0, "model1"): [4, 5], (1, "model1"): [6, 7],
    }  # fmt: skip
    assert layers_of_chunks(2, 3, layers=6) == {
        (0, "model0"): [0], (1, "model0"): [1],
        (0, "model1"): [2], (1, "model1"): [3],
        (0, "model2"): [4], (1, "model2"): [5],
    }  # fmt: skip


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (2, 4)])
def test_the_first_and_the_last_chunk_are_one_each(pp: int, vpp: int) -> None:
    chunks = model_chunks(QWEN, ParallelLayout(1, pp, vpp, "local"))
    assert [chunk.first for chunk in chunks] == [True] + [False] * (pp * vpp - 1)
    assert [chunk.last for chunk in chunks] == [False] * (pp * vpp - 1) + [True]
    assert (chunks[0].pp_rank, chunks[-1].pp_rank) == (0, pp - 1)


def test_a_chunk_counts_its_layers_from_zero() -> None:
    first, second = model_chunks(QWEN, ParallelLayout(1, 2, 1, "transformer_engine"))
    te = ParallelLayout(1, 2, 1, "transformer_engine")
    names = [f"decoder.layers.{position}.{name}" for position in range(4) for name in LAYER]
    placed = chunk_tensors(QWEN, te, first)
    assert [each.name for each in placed] == ["embedding.word_embeddings.weight", *names]
    assert [each.layer for each in placed] == [None] + [layer for layer in range(4) for _ in LAYER]
    placed = chunk_tensors(QWEN, te, second)
    assert [each.name for each in placed] == [*names, "decoder.final_layernorm.weight", "output_layer.weight"]
    assert [each.layer for each in placed] == [layer for layer in range(4, 8) for _ in LAYER] + [None, None]


def test_local_names_have_norms_of_their_own() -> None:
    local = ParallelLayout(1, 1, 1, "local")
    (chunk,) = model_chunks(QWEN, local)
    names = {each.name for each in chunk_tensors(QWEN, local, chunk)}
    assert {"decoder.layers.7.input_layernorm.weight", "decoder.layers.7.pre_mlp_layernorm.weight"} <= names
    assert not any("layer_norm_weight" in name for name in names)


def test_a_tied_model_has_a_copy_of_its_embedding_on_another_last_stage() -> None:
    for pp, vpp in ((2, 1), (2, 2)):
        layout = ParallelLayout(1, pp, vpp, "local")
        chunks = model_chunks(TIED, layout)
        rows = [[(each.name, each.mapping) for each in chunk_tensors(TIED, layout, chunk)] for chunk in chunks]
        assert rows[-1][-1] == ("output_layer.weight", EMBEDDING)
        assert not any(name == "output_layer.weight" for chunk in rows[:-1] for name, _ in chunk)
    (only,) = model_chunks(TIED, ParallelLayout(1, 1, 1, "local"))
    assert all(
        each.name != "output_layer.weight" for each in chunk_tensors(TIED, ParallelLayout(1, 1, 1, "local"), only)
    )


def test_each_chunk_may_have_a_number_of_layers_of_its_own() -> None:
    assert layers_of_chunks(3, 1, each=(2, 5, 1)) == {
        (0, "model"): [0, 1], (1, "model"): [2, 3, 4, 5, 6], (2, "model"): [7],
    }  # fmt: skip
    assert layers_of_chunks(2, 2, each=(1, 3, 3, 1)) == {
        (0, "model0"): [0], (1, "model0"): [1, 2, 3],
        (0, "model1"): [4, 5, 6], (1, "model1"): [7],
    }  # fmt: skip
    assert layers_of_chunks(2, 1, each=(4, 4)) == layers_of_chunks(2, 1)


@pytest.mark.parametrize("qwen", [QWEN, TIED, QWEN3])
@pytest.mark.parametrize(
    ("pp", "vpp", "each"), [(1, 1, ()), (2, 1, ()), (2, 4, ()), (8, 1, ()), (3, 1, (3, 3, 2)), (2, 2, (1, 2, 4, 1))]
)
def test_every_tensor_is_in_one_place(qwen: QwenConfig, pp: int, vpp: int, each: tuple[int, ...]) -> None:
    layout = ParallelLayout(1, pp, vpp, "local", each)
    counted = Counter(
        (each.mapping, each.layer)
        for chunk in model_chunks(qwen, layout)
        for each in chunk_tensors(qwen, layout, chunk)
        if not (each.name == OUTPUT.te and qwen.tie_word_embeddings)
    )
    assert counted == Counter(model_tensors(qwen)) and set(counted.values()) == {1}


def test_the_full_model_in_its_order() -> None:
    names = [
        row.megatron_name("transformer_engine", layer)
        for row, layer in model_tensors(replace(QWEN, num_hidden_layers=2))
    ]
    assert names == [
        "embedding.word_embeddings.weight",
        *(f"decoder.layers.{i}.{name}" for i in range(2) for name in LAYER),
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    assert [row for row, _ in model_tensors(TIED)][-1].te == "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "TP=0: it must be at least 1"),
        ((1, -1, 1), "PP=-1: it must be at least 1"),
        ((1, 1, 0), "VPP=0: it must be at least 1"),
        ((1, 1, 2), "VPP=2 needs pipeline stages, but PP=1: set PP to 2 or more, or VPP=1"),
        ((3, 1, 1), r"TP=3 does not divide num_attention_heads=4 .*: use TP in \[1, 2\]"),
        ((4, 1, 1), r"TP=4 does not divide num_key_value_heads=2 .*: use TP in \[1, 2\]"),
        ((1, 3, 1), "8 layers cannot be divided by PP=3 .*, or give each its number, as PIPELINE_LAYERS=3,3,2"),
        ((1, 4, 3), "8 layers cannot be divided by PP=4 x VPP=3 = 12: choose PP and VPP whose .* the layers$"),
    ],
)
def test_sizes_that_cannot_be_are_reported(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(KitError, match=message):
        ParallelLayout(*sizes, "local").check(QWEN)


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ((4, 4, 1), r"PIPELINE_LAYERS=4,4,1 are 3 numbers of 9 layers: PP=3 x VPP=1 needs 3 numbers, of 8 layers"),
        ((4, 4), r"PIPELINE_LAYERS=4,4 are 2 numbers of 8 layers: PP=3 x VPP=1 needs 3 numbers, of 8 layers together"),
    ],
)
def test_layers_that_are_not_the_models_are_reported(each: tuple[int, ...], message: str) -> None:
    with pytest.raises(KitError, match=message):
        ParallelLayout(1, 3, 1, "local", each).check(QWEN)


def test_sizes_that_can_be_pass() -> None:
    ParallelLayout(1, 3, 1, "local", (3, 2, 3)).check(QWEN)
    for sizes in ((1, 1, 1), (2, 8, 1), (2, 2, 4), (1, 4, 2)):
        ParallelLayout(*sizes, "local").check(QWEN)
