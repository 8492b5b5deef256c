"""The `args` of a checkpoint, which Megatron-LM's loader compares and reads."""

from argparse import Namespace

from common.checkpoint.formats.parallel_layout import ParallelLayout
from common.model.shape.config import QwenConfig


def megatron_arguments(qwen: QwenConfig, layout: ParallelLayout) -> Namespace:
    """Megatron-LM's arguments for this config and layout (load_args_from_checkpoint in training/checkpointing.py)."""
    return Namespace(
        num_layers=qwen.num_hidden_layers,
        hidden_size=qwen.hidden_size,
        ffn_hidden_size=qwen.intermediate_size,
        num_attention_heads=qwen.num_attention_heads,
        num_query_groups=qwen.num_key_value_heads,
        group_query_attention=True,
        kv_channels=qwen.head_dim,
        max_position_embeddings=qwen.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(qwen.rope_theta),
        rotary_percent=1.0,
        normalization="RMSNorm",
        norm_epsilon=qwen.rms_norm_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=qwen.qkv_bias,
        qk_layernorm=qwen.qk_norm,
        untie_embeddings_and_output_weights=not qwen.tie_word_embeddings,
        vocab_size=qwen.vocab_size,
        padded_vocab_size=qwen.padded_vocab_size(layout.tp),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        transformer_impl=layout.transformer_impl,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
