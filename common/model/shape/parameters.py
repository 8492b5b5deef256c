"""The number of parameters of a model, from its config."""

from common.model.shape.config import QwenConfig

ELEMENT_BYTES = {"bf16": 2, "fp32": 4}  # per weight, by PRECISION


def layer_parameters(qwen: QwenConfig, tp: int) -> int:
    """Parameters of one layer on one tensor-parallel rank; the norms are replicated."""
    h, d = qwen.hidden_size, qwen.head_dim
    projections = (h * qwen.qkv_rows + qwen.num_attention_heads * d * h) // tp
    bias = qwen.qkv_rows // tp if qwen.qkv_bias else 0
    mlp = 3 * h * qwen.intermediate_size // tp
    norms = 2 * h + (2 * d if qwen.qk_norm else 0)
    return projections + bias + mlp + norms


def vocabulary_parameters(qwen: QwenConfig, tp: int) -> int:
    """Parameters of the embedding, or of the output layer, on one tensor-parallel rank."""
    return qwen.padded_vocab_size(tp) // tp * qwen.hidden_size


def num_parameters(qwen: QwenConfig) -> int:
    """Parameters of the whole model; with tied embeddings the output layer has none of its own."""
    matrices = 1 if qwen.tie_word_embeddings else 2
    layers = qwen.num_hidden_layers * layer_parameters(qwen, 1)
    return layers + matrices * vocabulary_parameters(qwen, 1) + qwen.hidden_size
