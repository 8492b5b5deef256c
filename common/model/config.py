"""QwenConfig: a model's shape and mathematics, read from its `config.json` and nowhere else."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import KitError
from common.model.rope import Yarn

MODEL_TYPES = ("qwen2", "qwen3")


@dataclass(frozen=True)
class QwenConfig:
    """The fields of a `config.json` that decide shapes and mathematics, under Hugging Face's names.

    Qwen2's query, key and value have biases; Qwen3's have none, and each head of query and key is normalized.
    Source: `transformers` models/qwen2/configuration_qwen2.py and models/qwen3/.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    head_dim: int
    dtype: str
    initializer_range: float = 0.02
    yarn: Yarn | None = None
    qkv_bias: bool = True
    qk_norm: bool = False
    unsupported: tuple[str, ...] = ()

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query, key and value weight: (heads + 2 groups) x head_dim."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding at this TP: `vocab_size`, rounded up only where TP does not divide it."""
        return -(-self.vocab_size // tp) * tp

    @property
    def longest_sequence(self) -> int:
        """Positions that the model can tell apart: `max_position_embeddings`, or what YaRN makes of them."""
        return max(self.max_position_embeddings, self.yarn.max_position_embeddings if self.yarn else 0)

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises KitError unless TP divides the heads, the key-value groups and the MLP."""
        rules = {
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "intermediate_size": self.intermediate_size,
        }
        for name, value in rules.items():
            if value % tp:
                allowed = [n for n in (1, 2, 4, 8) if all(size % n == 0 for size in rules.values())]
                raise KitError(f"TP={tp} does not divide {name}={value} of this model: use TP in {allowed}")

    def chunk_layers(self, pp: int, vpp: int = 1, pipeline_layers: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Layers of each of the PP x VPP chunks, in the model's order: `pipeline_layers`, or as many each.

        Raises KitError where the layers cannot be divided so, or `pipeline_layers` are too many, few or other layers.
        """
        count, layers = pp * vpp, self.num_hidden_layers
        if not pipeline_layers and layers % count:
            even = [layers // count + (index < layers % count) for index in range(count)]
            remedy = f"or give each its number, as PIPELINE_LAYERS={','.join(map(str, even))}" if all(even) else ""
            raise KitError(
                f"{layers} layers cannot be divided by PP={pp} x VPP={vpp} = {count}:"
                f" choose PP and VPP whose product divides the layers{', ' if remedy else ''}{remedy}"
            )
        chosen = pipeline_layers or (layers // count,) * count
        if len(chosen) != count or sum(chosen) != layers:
            raise KitError(
                f"PIPELINE_LAYERS={','.join(map(str, chosen))} are {len(chosen)} numbers of {sum(chosen)} layers:"
                f" PP={pp} x VPP={vpp} needs {count} numbers, of {layers} layers together"
            )
        return chosen

    def check_trainable(self) -> None:
        """Raises KitError naming each field of `config.json` that changes the mathematics and is not built."""
        if self.unsupported:
            raise KitError(
                f"config.json asks for {', '.join(self.unsupported)}, which this kit does not train:"
                " remove the field if the model was trained without it, else use another model"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face or checkpoint folder; raises KitError when it is missing or no JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise KitError(f"{folder} has no config.json: give a folder with the Hugging Face model's config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KitError(f"{path} is no JSON ({error}): copy it again from the model") from error
    if not isinstance(values, dict):
        raise KitError(f"{path} holds no JSON object: copy it again from the model")
    return values


def load_config(folder: Path) -> QwenConfig:
    """The QwenConfig of `folder`; raises KitError when a field is missing or the model unknown."""
    return parse_config(read_config(folder), folder / "config.json")


def parse_config(values: dict[str, Any], source: Path) -> QwenConfig:
    """The QwenConfig that `values` hold, in the layout of transformers 4 or 5; `source` is named in errors."""
    if values.get("model_type") not in MODEL_TYPES:
        raise KitError(f"{source}: model_type={values.get('model_type')!r} is not known; known: {list(MODEL_TYPES)}")
    rope = values.get("rope_parameters") or {}
    theta = values.get("rope_theta", rope.get("rope_theta"))
    scaling = values.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    yarn = _yarn(scaling)
    heads = _need(values, "num_attention_heads", source)
    hidden = _need(values, "hidden_size", source)
    if theta is None:
        raise KitError(f"{source} has no rope_theta: add it from the model's own config.json")
    return QwenConfig(
        hidden_size=hidden,
        intermediate_size=_need(values, "intermediate_size", source),
        num_hidden_layers=_need(values, "num_hidden_layers", source),
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        vocab_size=_need(values, "vocab_size", source),
        rms_norm_eps=_need(values, "rms_norm_eps", source),
        rope_theta=float(theta),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_position_embeddings=_need(values, "max_position_embeddings", source),
        head_dim=values.get("head_dim") or hidden // heads,
        dtype=values.get("torch_dtype") or values.get("dtype") or "float32",
        initializer_range=float(values.get("initializer_range", 0.02)),
        yarn=yarn,
        qkv_bias=values["model_type"] == "qwen2",
        qk_norm=values["model_type"] == "qwen3",
        unsupported=tuple(_unsupported(values, None if yarn else scaling)),
    )


def _yarn(scaling: dict[str, Any] | None) -> Yarn | None:
    """The YaRN that `scaling` asks for; None where it asks for something else, or more than is built here."""
    fields = {name: value for name, value in (scaling or {}).items() if name not in ("type", "rope_type", "rope_theta")}
    known = {field.name for field in dataclasses.fields(Yarn)}
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type")
    if kind != "yarn" or not {"factor", "original_max_position_embeddings"} <= fields.keys() <= known:
        return None
    return Yarn(**fields)


def _need(values: dict[str, Any], name: str, source: Path) -> Any:
    if values.get(name) is None:
        raise KitError(f"{source} has no {name}: add it from the model's own config.json")
    return values[name]


def _unsupported(values: dict[str, Any], scaling: dict[str, Any] | None) -> list[str]:
    """The fields, with their values, whose mathematics is not built here."""
    found = []
    if scaling:
        found.append(f"rope_scaling={scaling}")
    if values.get("use_sliding_window"):
        found.append("use_sliding_window=true")
    if any(kind != "full_attention" for kind in values.get("layer_types") or []):
        found.append("layer_types other than full_attention")
    if values.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act={values['hidden_act']}")
    if values["model_type"] == "qwen3" and values.get("attention_bias"):
        found.append("attention_bias=true")
    if values.get("attention_dropout"):
        found.append(f"attention_dropout={values['attention_dropout']}")
    return found
