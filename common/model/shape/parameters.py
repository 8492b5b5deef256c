"""How many parameters a model has, by its config alone."""

from common.model.shape.config import QwenConfig

ELEMENT_BYTES = {"bf16": 2, "fp32": 4}  # of a weight, by PRECISION


def layer_parameters(qwen: QwenConfig, tp: int) -> int:
    """Parameters of one layer on one tensor-parallel rank; the norms are whole on each."""
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
    """Parameters of the whole model; a tied one has one matrix for embedding and output layer."""
    matrices = 1 if qwen.tie_word_embeddings else 2
    layers = qwen.num_hidden_layers * layer_parameters(qwen, 1)
    return layers + matrices * vocabulary_parameters(qwen, 1) + qwen.hidden_size
