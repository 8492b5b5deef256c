"""A checkpoint's arguments under Megatron-LM's names."""

from pathlib import Path

import pytest

from common.checkpoint.formats.megatron_args import megatron_arguments
from common.checkpoint.formats.parallel_layout import ParallelLayout
from tests.unit.checkpoint.small import write_hf


@pytest.mark.parametrize("tied", [True, False])
def test_arguments_are_those_of_the_model_and_the_layout(tmp_path: Path, tied: bool) -> None:
    qwen, _ = write_hf(tmp_path, tie_word_embeddings=tied)
    assert vars(megatron_arguments(qwen, ParallelLayout(2, 4, 1, "local"))) == {
        "num_layers": 4,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "group_query_attention": True,
        "kv_channels": 2,
        "max_position_embeddings": 16,
        "position_embedding_type": "rope",
        "rotary_base": 1000000,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not tied,
        "vocab_size": 11,
        "padded_vocab_size": 12,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "virtual_pipeline_model_parallel_size": None,
        "transformer_impl": "local",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    assert megatron_arguments(qwen, ParallelLayout(1, 2, 2, "local")).virtual_pipeline_model_parallel_size == 2
