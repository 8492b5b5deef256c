"""The parameter mapping between Hugging Face and Megatron, used in both directions.

Letters: h hidden_size, f intermediate_size, d head_dim, n attention heads, g key-value groups, v vocabulary.
A `ParamMapping` is one Megatron tensor; one of each layer where its name contains `{i}`. Every function is pure.

Fused query, key and value, [(n + 2g) d, h]: for each group its n/g query heads, its key head, its value head.
With n = 4, g = 2, d = 1, so that each head is one row:

    q0 q1 k0 | q2 q3 k1 with the values      linear_qkv rows: q0 q1 k0 v0 q2 q3 k1 v1
    \\ group 0 / \\ group 1 /                  at TP2:          ---- 0 ---- ---- 1 ----

Fused gate and up, [2f, h]: gate, then up. The shard of TP rank t is [gate_t; up_t]: with f = 4 rows

    g0 g1 g2 g3 u0 u1 u2 u3                  at TP2:          g0 g1 u0 u1 | g2 g3 u2 u3

Source: megatron/core/transformer/attention.py (get_query_key_value_tensors) and mlp.py (glu).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from common.errors import KitError
from common.model.shape.config import QwenConfig

T = TypeVar("T")
LAYERS = "decoder.layers."
IMPLEMENTATIONS = ("transformer_engine", "local")


@dataclass(frozen=True)
class ParamMapping:
    """One Megatron tensor: its name in either layer implementation, its Hugging Face parts, and its TP sharding."""

    te: str
    hf: tuple[str, ...]
    merge: Literal["copy", "qkv", "gate_up"] = "copy"
    axis: int | None = None  # sharded over TP along this axis; None: replicated
    stage: Literal["first", "layer", "last"] = "layer"
    local: str = ""  # where it differs from `te`
    vocabulary: bool = False  # rows are padded to a multiple of TP

    def megatron_name(self, transformer_impl: str, layer: int | None = None) -> str:
        """The name in a Megatron state dict; `layer` is numbered within the model chunk."""
        name = self.local if self.local and transformer_impl == "local" else self.te
        return name if layer is None else name.replace("{i}", str(layer))

    def hf_names(self, layer: int | None = None) -> tuple[str, ...]:
        """The names in a Hugging Face state dict; `layer` is numbered within the whole model."""
        return tuple(name if layer is None else name.replace("{i}", str(layer)) for name in self.hf)


_M, _H = LAYERS + "{i}.", "model.layers.{i}."
_QKV = tuple(f"{_H}self_attn.{part}_proj." for part in "qkv")
EMBEDDING = ParamMapping(
    "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), axis=0, stage="first", vocabulary=True
)
QKV_BIAS = ParamMapping(_M + "self_attention.linear_qkv.bias", tuple(name + "bias" for name in _QKV), "qkv", axis=0)
QK_NORMS = tuple(
    ParamMapping(f"{_M}self_attention.{part}_layernorm.weight", (f"{_H}self_attn.{part}_norm.weight",)) for part in "qk"
)
OUTPUT = ParamMapping("output_layer.weight", ("lm_head.weight",), axis=0, stage="last", vocabulary=True)
PARAM_MAPPINGS = (
    EMBEDDING,
    ParamMapping(
        _M + "self_attention.linear_qkv.layer_norm_weight",
        (_H + "input_layernorm.weight",),
        local=_M + "input_layernorm.weight",
    ),
    ParamMapping(_M + "self_attention.linear_qkv.weight", tuple(name + "weight" for name in _QKV), "qkv", axis=0),
    QKV_BIAS,
    *QK_NORMS,
    ParamMapping(_M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), axis=1),
    ParamMapping(
        _M + "mlp.linear_fc1.layer_norm_weight",
        (_H + "post_attention_layernorm.weight",),
        local=_M + "pre_mlp_layernorm.weight",
    ),
    ParamMapping(
        _M + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), "gate_up", axis=0
    ),
    ParamMapping(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), axis=1),
    ParamMapping("decoder.final_layernorm.weight", ("model.norm.weight",), stage="last"),
    OUTPUT,
)
# Buffers and Transformer Engine's FP8 state, which are not converted.
_SKIPPED = re.compile(r"(^|\.)_extra_state(\d+|/.*)?$|rotary_(pos_)?emb\.inv_freq$")


def is_skipped(name: str) -> bool:
    """Whether `name` is a known entry without weights: `_extra_state`, `rotary_emb.inv_freq`."""
    return bool(_SKIPPED.search(name))


def param_mappings(qwen: QwenConfig) -> tuple[ParamMapping, ...]:
    """The mappings of this config: no output layer if tied, a QKV bias (Qwen2.5) or QK norms (Qwen3)."""
    absent = {OUTPUT} if qwen.tie_word_embeddings else set()
    absent |= set() if qwen.qkv_bias else {QKV_BIAS}
    absent |= set() if qwen.qk_norm else set(QK_NORMS)
    return tuple(mapping for mapping in PARAM_MAPPINGS if mapping not in absent)


def hf_shape(name: str, qwen: QwenConfig) -> tuple[int, ...]:
    """The shape of the Hugging Face tensor `name`, from config.json."""
    h, f, d = qwen.hidden_size, qwen.intermediate_size, qwen.head_dim
    rows = {
        "embed_tokens": qwen.vocab_size,
        "lm_head": qwen.vocab_size,
        "q_proj": qwen.num_attention_heads * d,
        "k_proj": qwen.num_key_value_heads * d,
        "v_proj": qwen.num_key_value_heads * d,
        "o_proj": h,
        "gate_proj": f,
        "up_proj": f,
        "down_proj": h,
    }
    module, kind = name.rsplit(".", 2)[-2:]
    if module not in rows:
        return (d,) if module in ("q_norm", "k_norm") else (h,)
    columns = {"o_proj": qwen.num_attention_heads * d, "down_proj": f}.get(module, h)
    return (rows[module],) if kind == "bias" else (rows[module], columns)


def megatron_shape(
    mapping: ParamMapping, qwen: QwenConfig, tp: int = 1, vocabulary_rows: int | None = None
) -> tuple[int, ...]:
    """The shape of one TP rank's shard; `vocabulary_rows` replaces the padded vocabulary size of this TP."""
    parts = [hf_shape(name, qwen) for name in mapping.hf_names(0)]
    shape = [sum(part[0] for part in parts), *parts[0][1:]]
    if mapping.vocabulary:
        shape[0] = vocabulary_rows or qwen.padded_vocab_size(tp)
    if mapping.axis is not None:
        shape[mapping.axis] //= tp
    return tuple(shape)


def merge(mapping: ParamMapping, parts: Sequence[Tensor], qwen: QwenConfig) -> list[Tensor]:
    """The views of the Hugging Face parts that, concatenated by rows, make the Megatron tensor.

    `parts` may hold any number of whole QKV groups.
    """
    if mapping.merge != "qkv":
        return list(parts)
    groups = zip(*(part.split(rows) for part, rows in zip(parts, _group_rows(qwen), strict=True)), strict=True)
    return [piece for group in groups for piece in group]


def split(mapping: ParamMapping, whole: Tensor, qwen: QwenConfig) -> list[list[Tensor]]:
    """For each Hugging Face part, the views of a Megatron tensor (whole, or a shard) that make it."""
    if mapping.merge == "qkv":
        rows = _group_rows(qwen)
        pieces = whole.split(rows * (whole.shape[0] // sum(rows)))
        return [list(pieces[part::3]) for part in range(3)]
    return [[whole]] if mapping.merge == "copy" else [[half] for half in whole.chunk(2)]


def _group_rows(qwen: QwenConfig) -> list[int]:
    """The number of rows of a group's queries, key and value."""
    return [qwen.num_attention_heads // qwen.num_key_value_heads * qwen.head_dim, qwen.head_dim, qwen.head_dim]


def shard(mapping: ParamMapping, part: Tensor, tp_rank: int, tp: int, vocabulary_rows: int) -> Tensor:
    """The shard of one Hugging Face part for TP rank `tp_rank`, before `merge`.

    A view, except where rows of zeros pad the vocabulary to `vocabulary_rows`.
    """
    if mapping.axis is None:
        return part
    if not mapping.vocabulary:
        return part.tensor_split(tp, dim=mapping.axis)[tp_rank]
    rows = vocabulary_rows // tp
    mine = part[tp_rank * rows : (tp_rank + 1) * rows]
    missing = rows - mine.shape[0]
    return torch.cat([mine, mine.new_zeros(missing, *mine.shape[1:])]) if missing else mine


def unshard(mapping: ParamMapping, shards: Sequence[Tensor], part: int, qwen: QwenConfig) -> list[list[Tensor]]:
    """The views of the TP shards that make the Hugging Face tensor number `part`.

    Views in one list are concatenated by columns, the lists by rows; padding rows are dropped. Of a replicated tensor
    rank 0's copy is used: the caller checks whether the copies agree.
    """
    if mapping.axis is None:
        return [[shards[0]]]
    if mapping.axis == 1:
        return [list(shards)]
    pieces = [piece for shard in shards for piece in split(mapping, shard, qwen)[part]]
    if mapping.vocabulary:
        pieces = [piece[: max(qwen.vocab_size - i * len(piece), 0)] for i, piece in enumerate(pieces)]
    return [[piece] for piece in pieces]


def canonical_name(name: str) -> str:
    """The Transformer Engine name of a Megatron parameter, from either name."""
    for mapping in PARAM_MAPPINGS:
        if mapping.local:
            name = _rename(name, mapping.local, mapping.te)
    return name


def rename_parameters(state: Mapping[str, T], transformer_impl: str) -> dict[str, T]:
    """`state` with the parameter names of `transformer_impl`, from either; other keys are kept."""
    renamed = {}
    for key, value in state.items():
        name = canonical_name(key)
        for mapping in PARAM_MAPPINGS if transformer_impl == "local" else ():
            if mapping.local:
                name = _rename(name, mapping.te, mapping.local)
        renamed[name] = value
    return renamed


def _rename(name: str, old: str, new: str) -> str:
    """`name` with the pattern `old`, which contains `{i}`, replaced by `new`."""
    return re.sub(re.escape(old).replace(r"\{i\}", r"(\d+)"), new.replace("{i}", r"\1"), name)


def implementation_of(names: Iterable[str]) -> str:
    """`transformer_engine` or `local`: the implementation that uses these parameter names."""
    return "transformer_engine" if all(canonical_name(name) == name for name in names) else "local"


def num_layers(names: Iterable[str]) -> int:
    """The number of layers of a model chunk with these parameter names."""
    found = (re.match(re.escape(LAYERS) + r"(\d+)\.", name) for name in names)
    return 1 + max((int(layer[1]) for layer in found if layer), default=-1)


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Raises KitError with the names of missing or unexpected tensors."""
    present, required = {name for name in found if not is_skipped(name)}, set(expected)
    missing = required - present
    if missing in ({"lm_head.weight"}, {OUTPUT.te}) and present <= required:
        raise KitError(
            f"{where} lacks {missing.pop()}, and its config.json does not tie the embeddings: set tie_word_embeddings"
            " to true there if the model ties them; otherwise a file is incomplete, copy it again"
        )
    for what, names in (("lacks", missing), ("holds unexpected tensors", present - required)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise KitError(f"{where} {what} {shown}: its config.json belongs to another model, or a file is incomplete")
