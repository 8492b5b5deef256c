"""The shapes of every size of Qwen2.5, at every TP and PP that it can have: every element has one place. No weights."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.checkpoint.conversion.conversion_plan import (
    BASE_MEMORY_BYTES,
    ExpectedFolder,
    plan_hf,
    plan_torch,
    plan_torch_dist,
)
from common.checkpoint.conversion.state_dict_adapter import MegatronTensors, hf_shapes
from common.checkpoint.formats.mapping import EMBEDDING, OUTPUT, ParamMapping
from common.checkpoint.formats.parallel_layout import ParallelLayout, chunk_tensors, model_chunks, model_tensors
from common.checkpoint.io.direct_io import BLOCK_BYTES
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.errors import KitError
from common.model.shape.config import QwenConfig, parse_config
from tests.unit.checkpoint.small import write_hf

# layers, hidden, heads, groups, ffn, vocabulary, tied, parameters (Hugging Face's model cards, and a count by hand).
# QwQ-32B and the R1 distillations have the shapes of 1.5B (untied there: Math), 7B, 14B and 32B.
SIZES = {
    "Qwen2.5-0.5B": (24, 896, 14, 2, 4864, 151936, True, 494_032_768),
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 8960, 151936, True, 1_543_714_304),
    "R1-Distill-Qwen-1.5B": (28, 1536, 12, 2, 8960, 151936, False, 1_777_088_000),
    "Qwen2.5-3B": (36, 2048, 16, 2, 11008, 151936, True, 3_085_938_688),
    "Qwen2.5-7B": (28, 3584, 28, 4, 18944, 152064, False, 7_615_616_512),
    "Qwen2.5-14B": (48, 5120, 40, 8, 13824, 152064, False, 14_770_033_664),
    "Qwen2.5-32B": (64, 5120, 40, 8, 27648, 152064, False, 32_763_876_352),
    "Qwen2.5-72B": (80, 8192, 64, 8, 29568, 152064, False, 72_706_203_648),
}


def config(name: str) -> QwenConfig:
    layers, hidden, heads, groups, ffn, vocabulary, tied, _ = SIZES[name]
    values = {
        "model_type": "qwen2", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return parse_config(values, Path(name))


def legal_tp(qwen: QwenConfig) -> list[int]:
    return [tp for tp in (1, 2, 4, 8) if not any(
        size % tp for size in (qwen.num_attention_heads, qwen.num_key_value_heads, qwen.intermediate_size)
    )]  # fmt: skip


def layouts(qwen: QwenConfig) -> list[ParallelLayout]:
    """Every TP with every PP up to 8: even where the layers divide, with two chunks where they do, uneven otherwise."""
    found = []
    for tp in legal_tp(qwen):
        for pp in range(1, 9):
            each, rest = divmod(qwen.num_hidden_layers, pp)
            uneven = tuple(each + (stage < rest) for stage in range(pp)) if rest else ()
            found.append(ParallelLayout(tp, pp, 1, "local", uneven))
            if pp > 1 and not qwen.num_hidden_layers % (2 * pp):
                found.append(ParallelLayout(tp, pp, 2, "transformer_engine"))
    return found


def test_every_size_has_its_number_of_parameters() -> None:
    for name, (*_, expected) in SIZES.items():
        shapes = hf_shapes(config(name)).values()
        assert sum(torch.Size(shape).numel() for shape in shapes) == expected, name


def test_tp_is_what_the_groups_allow() -> None:
    assert [max(legal_tp(config(name))) for name in SIZES] == [2, 2, 2, 2, 4, 8, 8, 8]


@pytest.mark.parametrize("name", SIZES)
def test_every_element_has_one_place_at_every_layout(name: str) -> None:
    qwen = config(name)
    source = MegatronTensors(ExpectedFolder(Path("/nowhere"), qwen, torch.bfloat16), qwen, None)
    expected = {(row, layer): source.tensor(row, layer, 0, 1).numel for row, layer in model_tensors(qwen)}
    for layout in layouts(qwen):
        layout.check(qwen)
        held: Counter[tuple[ParamMapping, int | None]] = Counter()
        copies = 0
        for chunk in model_chunks(qwen, layout):
            for placed in chunk_tensors(qwen, layout, chunk):
                sizes = [
                    source.tensor(placed.mapping, placed.layer, rank, layout.tp).numel for rank in range(layout.tp)
                ]
                if placed.mapping is EMBEDDING and placed.name == OUTPUT.te:
                    copies += sum(sizes)
                else:
                    held[placed.mapping, placed.layer] += sizes[0] if placed.mapping.axis is None else sum(sizes)
        assert held == expected, layout
        assert copies == (expected[EMBEDDING, None] if qwen.tie_word_embeddings and layout.pp > 1 else 0)


def test_a_plan_needs_config_and_index_alone(tmp_path: Path) -> None:
    qwen, _ = write_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(hf_shapes(qwen), "model-00001-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = MegatronTensors(ExpectedFolder(tmp_path, qwen, torch.float16), qwen, None)
    lines = list(plan_torch(source, ParallelLayout(2, 2, 1, "local")))
    (line,) = [
        line for line in lines if "mp_rank_01_001" in line and "layers.1.self_attention.linear_qkv.weight" in line
    ]
    assert line == (
        "model.layers.3.self_attn.q_proj.weight + model.layers.3.self_attn.k_proj.weight"
        " + model.layers.3.self_attn.v_proj.weight  ->  release/mp_rank_01_001/model_optim_rng.pt"
        "  model/decoder.layers.1.self_attention.linear_qkv.weight  [8, 8] float16 128 bytes"
    )
    size = sum(torch.Size(shape).numel() for shape in hf_shapes(qwen).values()) * 2
    lines = list(plan_torch_dist(source))
    assert f"total: 31 tensors, {size:,} bytes in 1 files" in lines
    assert "release/__0_0.distcp  decoder.layers.mlp.linear_fc2.weight[3]  [1, 8, 8] float16 128 bytes" in lines
    assert "release/__0_0.distcp  decoder.final_layernorm.weight  [8] float16 16 bytes" in lines
    index["weight_map"]["model.layers.9.norm.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(KitError, match=r"holds unexpected tensors model\.layers\.9\.norm\.weight"):
        ExpectedFolder(tmp_path, qwen, torch.float16)


def test_a_plan_of_an_export_fills_the_files() -> None:
    def nothing() -> torch.Tensor:
        raise AssertionError

    tensors = {name: LazyTensor((10,), torch.bfloat16, nothing) for name in "abc"}
    lines = list(plan_hf(tensors, 40))
    assert lines[:2] == [
        "model-00001-of-00002.safetensors  a  [10] bfloat16 20 bytes",
        "model-00001-of-00002.safetensors  b  [10] bfloat16 20 bytes",
    ]
    assert "model-00002-of-00002.safetensors: 1 tensors, 20 bytes" in lines
    assert "total: 3 tensors, 60 bytes in 2 files" in lines


def test_time_and_memory_are_those_of_the_disk_and_of_what_is_held_at_once() -> None:
    qwen = replace(config("Qwen2.5-72B"), num_hidden_layers=1)
    source = MegatronTensors(ExpectedFolder(Path("/nowhere"), qwen, torch.bfloat16), qwen, None)
    size = 2 * sum(torch.Size(shape).numel() for shape in hf_shapes(qwen).values())
    for plan, held in (
        (plan_torch_dist(source), 0),
        (plan_torch(source, ParallelLayout(1, 1, 1, "local")), 2 * BLOCK_BYTES),
        (plan_torch(source, ParallelLayout(8, 1, 1, "local")), 2 * 8192 * 29568 + 16 * BLOCK_BYTES),  # down_proj
    ):
        *_, last = plan
        assert last.startswith(f"time: about {2 * size / 1e9:.0f} s to read and write at 1 GB/s, and as")
        assert last.endswith(f"; memory: up to {(BASE_MEMORY_BYTES + held) / 2**30:.1f} GiB")


@pytest.mark.parametrize("size", [replace(config(name), num_hidden_layers=1) for name in SIZES], ids=list(SIZES))
def test_megatrons_sizes_are_counted_in_the_plan(size: QwenConfig) -> None:
    source = MegatronTensors(ExpectedFolder(Path("/nowhere"), size, torch.bfloat16), size, None)
    numel = sum(torch.Size(shape).numel() for shape in hf_shapes(size).values())
    assert any(
        f" {2 * numel:,} bytes in 1 files" in line for line in plan_torch(source, ParallelLayout(1, 1, 1, "local"))
    )
