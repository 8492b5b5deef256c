"""QwenConfig: a model's architecture, read only from its `config.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import KitError
from common.json_file import read_json, shown
from common.model.shape.config_fields import (
    MODEL_TYPES,
    head_dim,
    parse_fields,
    parse_yarn,
    rope_theta,
    unsupported,
)
from common.model.shape.rope import Yarn


@dataclass(frozen=True)
class QwenConfig:
    """The fields of a `config.json` that define the model, under Hugging Face's names.

    Qwen2 has biases on query, key and value; Qwen3 has none, and normalizes each head of query and key.
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
        """Rows of the embedding at this TP: `vocab_size`, rounded up only if TP does not divide it."""
        return -(-self.vocab_size // tp) * tp

    @property
    def longest_sequence(self) -> int:
        """The longest sequence in tokens: `max_position_embeddings`, or YaRN's extension of it."""
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
        """Layers of each of the PP x VPP chunks, in model order: `pipeline_layers`, or the same number each.

        Raises KitError if the layers cannot be divided evenly, or `pipeline_layers` does not fit the chunks or layers.
        """
        count, layers = pp * vpp, self.num_hidden_layers
        if not pipeline_layers and layers % count:
            even = [layers // count + (index < layers % count) for index in range(count)]
            remedy = f"or give each its number, as PIPELINE_LAYERS={','.join(map(str, even))}" if all(even) else ""
            raise KitError(
                f"{layers} layers cannot be divided by PP={pp} x VPP={vpp} = {count}:"
                f" choose PP and VPP whose product divides the layers{', ' if remedy else ''}{remedy}"
            )
        split = pipeline_layers or (layers // count,) * count
        if len(split) != count or sum(split) != layers:
            raise KitError(
                f"PIPELINE_LAYERS={','.join(map(str, split))} are {len(split)} numbers of {sum(split)} layers:"
                f" PP={pp} x VPP={vpp} needs {count} numbers, of {layers} layers together"
            )
        return split

    def check_trainable(self) -> None:
        """Raises KitError naming each field of `config.json` that changes the model and is not supported."""
        if self.unsupported:
            raise KitError(
                f"config.json asks for {', '.join(self.unsupported)}, which this kit does not train:"
                " remove the field if the model was trained without it, else use another model"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face or checkpoint folder; raises KitError if it is missing or not JSON."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise KitError(f"{folder} holds a LoRA adapter, not a model: step 3 starts from one with LORA_ADAPTER")
    if not path.is_file():
        raise KitError(f"{folder} has no config.json: give a folder with the Hugging Face model's config.json")
    return read_json(path, "copy it again from the model")


def load_config(folder: Path) -> QwenConfig:
    """The QwenConfig of `folder`; raises KitError as `parse_config` does, and if there is no config.json."""
    return parse_config(read_config(folder), folder / "config.json")


def parse_config(values: dict[str, Any], source: Path) -> QwenConfig:
    """The QwenConfig of `values`, as written by transformers 4 or 5; `source` is named in errors.

    Raises KitError if the model type is unknown, and for fields that are missing, have a type that transformers does
    not write, or are out of range.
    """
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise KitError(f"{source}: model_type={shown(model_type)} is not known; known: {list(MODEL_TYPES)}")
    fields = parse_fields(values, source)
    yarn = parse_yarn(fields, source)
    return QwenConfig(
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size,
        num_hidden_layers=fields.num_hidden_layers,
        num_attention_heads=fields.num_attention_heads,
        num_key_value_heads=fields.num_key_value_heads or fields.num_attention_heads,
        vocab_size=fields.vocab_size,
        rms_norm_eps=fields.rms_norm_eps,
        rope_theta=rope_theta(fields, source),
        tie_word_embeddings=fields.tie_word_embeddings,
        max_position_embeddings=fields.max_position_embeddings,
        head_dim=head_dim(fields, values["model_type"], source),
        dtype=fields.torch_dtype or fields.dtype or "float32",
        initializer_range=fields.initializer_range,
        yarn=yarn,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        unsupported=unsupported(fields, model_type, yarn),
    )
