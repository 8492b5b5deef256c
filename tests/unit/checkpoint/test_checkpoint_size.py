"""The size of a checkpoint by formula: parameters against the table of tensors, bytes against what was measured."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from common.checkpoint.formats.checkpoint_size import checkpoint_bytes
from common.checkpoint.formats.mapping import megatron_shape, param_mappings
from common.model.shape.config import QwenConfig, parse_config
from common.model.shape.parameters import num_parameters

SHAPES = json.loads((Path(__file__).parents[2] / "bench" / "data" / "steps.json").read_text())["shapes"]


def config(name: str) -> QwenConfig:
    return parse_config(SHAPES[name], Path("config.json"))


def elements(qwen: QwenConfig) -> int:
    """Elements of all Megatron tensors."""
    times = {"layer": qwen.num_hidden_layers}
    return sum(math.prod(megatron_shape(row, qwen)) * times.get(row.stage, 1) for row in param_mappings(qwen))


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_table(name: str) -> None:
    qwen = config(name)
    qwen3 = replace(qwen, qkv_bias=False, qk_norm=True, tie_word_embeddings=not qwen.tie_word_embeddings)
    assert [num_parameters(each) for each in (qwen, qwen3)] == [elements(each) for each in (qwen, qwen3)]


@pytest.mark.parametrize(("name", "gigabytes"), [("0.5B", 6.9), ("1.5B", 21.6), ("7B", 107)])
def test_it_is_what_checkpoints_of_full_models_took_on_the_disk(name: str, gigabytes: float) -> None:
    assert checkpoint_bytes(config(name), "bf16") / 1e9 == pytest.approx(gigabytes, rel=0.005)
    halved, same = (checkpoint_bytes(config(name), "bf16", optimizer_state=kind) for kind in ("bf16", "cpu_bf16"))
    assert halved == same == 10 * elements(config(name))  # 76.157 GB of Qwen2.5-7B were seen
    assert checkpoint_bytes(config(name), "bf16", save_optimizer=False) == 2 * elements(config(name))
