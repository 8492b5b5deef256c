"""The Hugging Face rows in a Megatron tensor, for verification: written independently of formats/mapping.py.

Source: megatron/core/transformer/attention.py (get_query_key_value_tensors) and mlp.py (glu).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from common.model.shape.config import QwenConfig


class Slice(NamedTuple):
    """Rows (and columns) of a Hugging Face tensor, and the `row` of the Megatron tensor where they start."""

    name: str
    rows: range
    columns: range | None  # None: all
    row: int


HF_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
HEAD_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")  # [head_dim]
COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")  # sharded by columns
NON_LAYER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


def slices(name: str, tp_rank: int, tp: int, qwen: QwenConfig, num_rows: int) -> Iterator[Slice]:
    """The Hugging Face rows in a Megatron tensor of `num_rows` rows, in its order."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if found is None:
        hf_name = NON_LAYER[name]
        if name == "decoder.final_layernorm.weight":
            yield Slice(hf_name, range(qwen.hidden_size), None, 0)
            return
        if name == "output_layer.weight" and qwen.tie_word_embeddings:
            hf_name = "model.embed_tokens.weight"
        first = tp_rank * num_rows
        yield Slice(hf_name, range(first, min(first + num_rows, qwen.vocab_size)), None, 0)
        return
    prefix, kind = f"model.layers.{found[1]}.", found[2]
    if kind.startswith("self_attention.linear_qkv.") and kind not in HF_LAYER:
        yield from _attention(f"{prefix}self_attn.", kind.rsplit(".", 1)[-1], tp_rank, tp, qwen)
    elif kind == "mlp.linear_fc1.weight":
        size = qwen.intermediate_size // tp
        for i, part in enumerate(("gate", "up")):
            yield Slice(f"{prefix}mlp.{part}_proj.weight", range(tp_rank * size, (tp_rank + 1) * size), None, i * size)
    elif kind in COLUMNS:
        width = qwen.num_attention_heads * qwen.head_dim if "proj" in kind else qwen.intermediate_size
        columns = range(tp_rank * width // tp, (tp_rank + 1) * width // tp)
        yield Slice(prefix + HF_LAYER[kind], range(qwen.hidden_size), columns, 0)
    else:
        size = qwen.head_dim if kind in HEAD_NORMS else qwen.hidden_size
        yield Slice(prefix + HF_LAYER[kind], range(size), None, 0)


def _attention(prefix: str, kind: str, tp_rank: int, tp: int, qwen: QwenConfig) -> Iterator[Slice]:
    """For each group of this rank: its query heads, its key head, its value head."""
    heads_per_group = qwen.num_attention_heads // qwen.num_key_value_heads
    groups = qwen.num_key_value_heads // tp
    row = 0
    for group in range(tp_rank * groups, (tp_rank + 1) * groups):
        for part, first_head, heads in (
            ("q", group * heads_per_group, heads_per_group),
            ("k", group, 1),
            ("v", group, 1),
        ):
            rows = range(first_head * qwen.head_dim, (first_head + heads) * qwen.head_dim)
            yield Slice(f"{prefix}{part}_proj.{kind}", rows, None, row)
            row += len(rows)
