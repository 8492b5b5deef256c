"""Validation of config.json: the type and range of each field that the kit reads.

Other fields are accepted, as in transformers; `unsupported` names those that change what the model computes.
Source: `transformers` models/qwen2/configuration_qwen2.py, models/qwen3/, modeling_rope_utils.py. The upper bounds are
far above any model's values; they keep a corrupted number from exhausting time or memory.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import KitError
from common.json_file import shown
from common.model.shape.rope import Yarn

MODEL_TYPES = ("qwen2", "qwen3")
_ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5
_REMEDY = "copy it again from the model"
_SHOWN = 5  # errors that a message lists

Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=10_000_000)]
Heads = Annotated[int, Field(ge=1, le=100_000)]
Rows = Annotated[int, Field(ge=1, le=100_000_000)]
Positions = Annotated[int, Field(ge=1, le=1_000_000_000)]
Theta = Annotated[float, Field(gt=1, le=1e18)]
Dtype = Literal["bfloat16", "float16", "float32"]


class _Strict(BaseModel):
    """No type coercion: neither "2" nor true is an integer, and "false" is not a boolean."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class YarnFields(_Strict):
    """YaRN's fields, as in `common.model.shape.rope.Yarn`."""

    factor: Annotated[float, Field(ge=1, le=1e6)]
    original_max_position_embeddings: Positions
    beta_fast: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    beta_slow: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    attention_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None


class RopeFields(_Strict):
    """`rope_scaling` (transformers 4) or `rope_parameters` (5); the other fields depend on its kind."""

    model_config = ConfigDict(extra="allow")
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Theta | None = None

    @property
    def kind(self) -> str:
        """As in transformers: `rope_type`, or its older name `type`."""
        return self.rope_type or self.type or "default"

    @property
    def others(self) -> dict[str, Any]:
        """The fields other than kind and theta."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}


class ConfigFields(_Strict):
    """The fields of config.json; null counts as absent."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=2, le=100_000, multiple_of=2)] | None = None  # RoPE rotates pairs
    vocab_size: Rows
    max_position_embeddings: Positions
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    initializer_range: Annotated[float, Field(ge=0, le=100)] = 0.02
    tie_word_embeddings: bool = False
    rope_theta: Theta | None = None
    rope_scaling: RopeFields | None = None
    rope_parameters: RopeFields | None = None
    torch_dtype: Dtype | None = None
    dtype: Dtype | None = None
    hidden_act: str = "silu"
    attention_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    attention_bias: bool | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    architectures: list[str] | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    is_causal: bool = True
    use_bidirectional_attention: bool = False
    quantization_config: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None


def parse_fields(values: dict[str, Any], source: Path) -> ConfigFields:
    """The fields of config.json; raises KitError with `source`, each invalid field and its valid values."""
    given = {
        name: value for name, value in values.items() if value is not None and not (name in _ROPES and value == {})
    }
    for name, field in ConfigFields.model_fields.items():
        if field.is_required() and name not in given:
            raise KitError(f"{source} has no {name}: add it from the model's own config.json")
    fields = _validated(ConfigFields, given, "", source)
    for wrong in _contradictions(fields):
        raise KitError(f"{source}: {wrong}")
    return fields


def parse_yarn(fields: ConfigFields, source: Path) -> Yarn | None:
    """The YaRN that config.json sets; None without one, or with fields that are not supported."""
    name, rope = scaling(fields)
    known = set(YarnFields.model_fields)
    needed = {"factor", "original_max_position_embeddings"}
    if rope is None or rope.kind != "yarn" or not needed <= rope.others.keys() <= known:
        return None
    return Yarn(**_validated(YarnFields, rope.others, f"{name}.", source).model_dump())


def rope_theta(fields: ConfigFields, source: Path) -> float:
    """RoPE's base: a top-level field in transformers 4, in `rope_parameters` in 5; raises KitError if missing."""
    ropes = [getattr(fields, name) for name in _ROPES]
    for theta in (fields.rope_theta, *(rope.rope_theta for rope in ropes if rope)):
        if theta is not None:
            return theta
    raise KitError(f"{source} has no rope_theta: add it from the model's own config.json")


def head_dim(fields: ConfigFields, model_type: str, source: Path) -> int:
    """The size of a head: the field, or 128 for Qwen3, or hidden_size / heads; raises KitError if that is not even."""
    if fields.head_dim is not None or model_type == "qwen3":
        return fields.head_dim or 128
    if fields.hidden_size % (2 * fields.num_attention_heads):
        raise KitError(
            f"{source}: hidden_size={fields.hidden_size} is no even multiple of num_attention_heads="
            f"{fields.num_attention_heads}, and there is no head_dim: add head_dim from the model's own config.json"
        )
    return fields.hidden_size // fields.num_attention_heads


def scaling(fields: ConfigFields) -> tuple[str, RopeFields | None]:
    """The name of the field that describes RoPE, and its value; None if its frequencies are the default."""
    name = "rope_scaling" if fields.rope_scaling else "rope_parameters"
    rope: RopeFields | None = getattr(fields, name)
    return name, rope if rope and (rope.kind != "default" or rope.others) else None


def unsupported(fields: ConfigFields, model_type: str, yarn: Yarn | None) -> tuple[str, ...]:
    """The fields, with their values, that the kit does not support."""
    _, rope = scaling(fields)
    supported: dict[str, Any] = {
        "use_sliding_window": False, "hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0,
        "is_causal": True, "use_bidirectional_attention": False,
    }  # fmt: skip
    found = [] if rope is None or yarn else [f"rope_scaling={shown(rope.model_dump(exclude_none=True))}"]
    given = {name: getattr(fields, name) for name in supported}
    found += [f"{name}={_as_json(value)}" for name, value in given.items() if value != supported[name]]
    if any(kind != "full_attention" for kind in fields.layer_types or []):
        found.append("layer_types other than full_attention")
    if fields.attention_bias not in (None, model_type == "qwen2"):
        found.append(f"attention_bias={_as_json(fields.attention_bias)}")
    if any(name not in _ARCHITECTURES for name in fields.architectures or []):
        found.append(f"architectures={shown(fields.architectures)}")
    if fields.quantization_config:
        found.append("quantization_config")
    if any(name.startswith("AutoModel") for name in fields.auto_map or {}):
        found.append("code of its own (auto_map)")
    return tuple(found)


def _as_json(value: Any) -> str:
    """The value as in JSON, strings without quotes."""
    return str(value).lower() if isinstance(value, bool) else shown(value).strip("'")


def _validated(kind: Any, values: dict[str, Any], where: str, source: Path) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
    errors = []
    for fault in faults[:_SHOWN]:
        name = ".".join(str(part) for part in fault["loc"])
        rule = fault["msg"].replace("Input should", "it must", 1).split(" or instance of")[0]
        errors.append(f"{where}{shown(name)[1:-1]}={shown(fault['input'])}: {rule}")
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    raise KitError(f"{source}: {'; '.join(errors)}{more}: {_REMEDY}")


def _contradictions(fields: ConfigFields) -> list[str]:
    """Errors between several fields."""
    heads, groups = fields.num_attention_heads, fields.num_key_value_heads
    found = []
    if groups and heads % groups:
        found.append(f"num_key_value_heads={groups} must divide num_attention_heads={heads}: {_REMEDY}")
    if fields.layer_types and len(fields.layer_types) != (layers := fields.num_hidden_layers):
        found.append(f"layer_types names {len(fields.layer_types)} layers of num_hidden_layers={layers}: {_REMEDY}")
    ropes = {name: rope for name in _ROPES if (rope := getattr(fields, name))}
    for name, rope in ropes.items():
        if rope.rope_type and rope.type and rope.rope_type != rope.type:
            found.append(f"{name} is of rope_type {shown(rope.rope_type)} and type {shown(rope.type)}: keep one")
    if len({repr((rope.kind, sorted(rope.others.items()))) for rope in ropes.values()}) > 1:
        found.append("rope_scaling and rope_parameters differ: keep the one that the model was trained with")
    thetas = {
        "rope_theta": fields.rope_theta,
        **{f"{name}.rope_theta": rope.rope_theta for name, rope in ropes.items()},
    }
    dtypes: dict[str, Any] = {"torch_dtype": fields.torch_dtype, "dtype": fields.dtype}
    for names in (thetas, dtypes):
        given = {name: value for name, value in names.items() if value is not None}
        if len(set(given.values())) > 1:
            text = ", ".join(f"{name}={value}" for name, value in given.items())
            found.append(f"{text} contradict each other: keep the one that the model was trained with")
    return found
