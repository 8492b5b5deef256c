"""What is read from config.json, compared with transformers' own reading, and what is refused."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Qwen2Config, Qwen3Config

from common.errors import KitError
from common.model.shape.config import QwenConfig, load_config, parse_config
from common.model.shape.rope import Yarn
from tests.tiny import tiny_qwen

# Qwen2.5-7B-Instruct's config.json, in the layout of transformers 4.
QWEN_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
SOURCE = Path("model/config.json")
IN_PARAMETERS = hasattr(Qwen2Config(), "rope_parameters")  # since transformers 5


def parse(**changes: Any) -> QwenConfig:
    """QWEN_7B with `changes`; a value of ... leaves the field out."""
    return parse_config({name: value for name, value in {**QWEN_7B, **changes}.items() if value is not ...}, SOURCE)


def write(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def test_a_published_config_is_read() -> None:
    qwen = parse()
    assert (qwen.hidden_size, qwen.intermediate_size, qwen.num_hidden_layers) == (3584, 18944, 28)
    assert (qwen.num_attention_heads, qwen.num_key_value_heads, qwen.head_dim) == (28, 4, 128)
    assert (qwen.vocab_size, qwen.tie_word_embeddings, qwen.max_position_embeddings) == (152064, False, 32768)
    assert (qwen.rms_norm_eps, qwen.rope_theta, qwen.dtype) == (1e-6, 1e6, "bfloat16")
    assert qwen.qkv_rows == 3584 + 2 * 512
    qwen.check_trainable()


def test_what_transformers_writes_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    theta = {"rope_theta": 12345.0}
    Qwen2Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=300, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=640, dtype="bfloat16",
        **({"rope_parameters": {"rope_type": "default", **theta}} if IN_PARAMETERS else theta),
    ).save_pretrained(tmp_path)  # fmt: skip
    qwen, theirs = load_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(qwen, name) == getattr(theirs, name)
    for name in ("vocab_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(qwen, name) == getattr(theirs, name)
    assert qwen.rope_theta == getattr(theirs, "rope_parameters", theirs.to_dict())["rope_theta"] == 12345.0
    assert (qwen.head_dim, qwen.dtype) == (8, "bfloat16")
    qwen.check_trainable()


def test_the_tests_own_model_is_read(tmp_path: Path) -> None:
    qwen = load_config(tiny_qwen(tmp_path, num_hidden_layers=2, tie_word_embeddings=False))
    assert (qwen.num_hidden_layers, qwen.tie_word_embeddings) == (2, False)


def test_fields_that_may_be_left_out_have_transformers_meaning() -> None:
    qwen = parse(num_key_value_heads=..., tie_word_embeddings=..., torch_dtype=..., head_dim=64)
    assert (qwen.num_key_value_heads, qwen.tie_word_embeddings, qwen.dtype) == (28, False, "float32")
    assert qwen.head_dim == 64 and qwen.qkv_rows == 3 * 28 * 64


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}  # from the model card, for 128K


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "yarn", **YARN}},
        {"rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ],
    ids=["card", "transformers 4", "transformers 5"],
)
def test_yarn_is_read_in_every_layout(changes: dict[str, Any]) -> None:
    qwen = parse(**changes)
    assert (qwen.yarn, qwen.rope_theta) == (Yarn(4.0, 32768), 1e6)
    qwen.check_trainable()


@pytest.mark.parametrize(
    "name",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps",
     "max_position_embeddings", "rope_theta"],
)  # fmt: skip
def test_a_missing_field_is_named_and_never_guessed(name: str) -> None:
    with pytest.raises(KitError, match=f"model/config.json has no {name}: add it from the model's own config.json"):
        parse(**{name: ...})


@pytest.mark.parametrize("kind", [..., "llama", "qwen2_moe"])
def test_another_model_type_is_refused_with_the_known_ones(kind: Any) -> None:
    with pytest.raises(KitError, match=r"model_type=.* is not known; known: \['qwen2', 'qwen3'\]"):
        parse(model_type=kind)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling={'type': 'yarn', 'factor': 4.0}"),
        ({"rope_scaling": {"type": "yarn", "mscale": 2.0, **YARN}}, "'mscale': 2.0"),
        ({"rope_theta": ..., "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "'rope_type': 'linear'"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types other than full_attention"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"attention_bias": False}, "attention_bias=false"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, "rope_scaling={'type': 'default', 'factor': 2.0}"),
        ({"is_causal": False}, "is_causal=false"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures=['Qwen2ForSequenceClassification']"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "code of its own (auto_map)"),
    ],
)
def test_mathematics_that_is_not_built_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=re.escape(message)) as raised:
        parse(**changes).check_trainable()
    assert "remove the field" in str(raised.value)


def test_all_unsupported_fields_are_reported_at_once() -> None:
    with pytest.raises(KitError, match="use_sliding_window=true, hidden_act=gelu"):
        parse(use_sliding_window=True, hidden_act="gelu").check_trainable()


def test_a_folder_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="has no config.json: give a folder"):
        load_config(tmp_path)
    with pytest.raises(KitError, match=r"is not valid JSON \(.*\): copy it again"):
        load_config(write(tmp_path, '{"model_type": '))
    with pytest.raises(KitError, match="is not a JSON object"):
        load_config(write(tmp_path, "[1]"))
    assert load_config(write(tmp_path, json.dumps(QWEN_7B))) == parse()


@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_rope_of_the_default_kind_is_plain_rope(where: str, name: str) -> None:
    qwen = parse(**{where: {name: "default", "rope_theta": 1e6}})
    assert qwen == parse()
    qwen.check_trainable()


def test_a_null_or_unknown_field_is_read_as_in_transformers() -> None:
    nulls = ("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "layer_types", "quantization_config")
    qwen = parse(**dict.fromkeys(nulls), _name_or_path="a", max_window_layers="x", sliding_window=None, new_field=[{}])
    assert (qwen.num_key_value_heads, qwen.head_dim, qwen.unsupported) == (28, 128, ())


def test_qwen3_without_head_dim_has_128_as_in_transformers() -> None:
    assert parse(model_type="qwen3", hidden_size=1024, num_attention_heads=16, num_key_value_heads=8).head_dim == 128
    assert Qwen3Config(hidden_size=1024, num_attention_heads=16).head_dim == 128


WRONG = [
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': it must be a valid boolean"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings=0: it must be a valid boolean"),
    ({"use_sliding_window": "false"}, "use_sliding_window='false': it must be a valid boolean"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers='2': it must be a valid integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True: it must be a valid integer"),
    ({"num_hidden_layers": 28.0}, "num_hidden_layers=28.0: it must be a valid integer"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: it must be less than or equal to 10000"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0: it must be greater than or equal to 1"),
    ({"num_attention_heads": 0}, "num_attention_heads=0: it must be greater than or equal to 1"),
    ({"num_attention_heads": -28}, "num_attention_heads=-28: it must be greater"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=28"),
    ({"num_key_value_heads": 56}, "num_key_value_heads=56 must divide num_attention_heads=28"),
    ({"hidden_size": [3584]}, "hidden_size=[3584]: it must be a valid integer"),
    ({"hidden_size": 3585}, "hidden_size=3585 is no even multiple of num_attention_heads=28, and there is no head_dim"),
    ({"head_dim": 0}, "head_dim=0: it must be greater than or equal to 2"),
    ({"head_dim": 63}, "head_dim=63: it must be a multiple of 2"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000: it must be less than or equal to 100000000"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': it must be a valid number"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan: it must be a finite number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0: it must be greater than 0"),
    ({"rope_theta": math.inf}, "rope_theta=inf: it must be a finite number"),
    ({"rope_theta": 1}, "rope_theta=1: it must be greater than 1"),
    ({"rope_theta": True}, "rope_theta=True: it must be a valid number"),
    ({"max_position_embeddings": {}}, "max_position_embeddings={}: it must be a valid integer"),
    ({"initializer_range": None, "torch_dtype": "auto"}, "torch_dtype='auto': it must be 'bfloat16', 'float16' or"),
    ({"dtype": "float32"}, "torch_dtype=bfloat16, dtype=float32 contradict each other"),
    ({"rope_parameters": [1]}, "rope_parameters=[1]: it must be a valid dictionary"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn': it must be a valid dictionary"),
    ({"rope_scaling": {"type": "yarn", **YARN, "factor": "4"}}, "rope_scaling.factor='4': it must be a valid number"),
    ({"rope_scaling": {"type": "yarn", **YARN, "factor": 0}}, "rope_scaling.factor=0: it must be greater"),
    ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling.type=['yarn']: it must be a valid string"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "is of rope_type 'default' and type 'yarn': keep one"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta=1000000.0, rope_parameters.rope_theta=5.0 contradict"),
    ({"rope_scaling": {"type": "a"}, "rope_parameters": {"type": "b"}}, "rope_scaling and rope_parameters differ"),
    ({"layer_types": "full_attention"}, "layer_types='full_attention': it must be a valid list"),
    ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of num_hidden_layers=28"),
    ({"hidden_act": 1}, "hidden_act=1: it must be a valid string"),
    ({"attention_dropout": "0.0"}, "attention_dropout='0.0': it must be a valid number"),
    ({"model_type": ["qwen2"]}, "model_type=['qwen2'] is not known"),
    ({"vocab_size": "9" * 1000}, "vocab_size='" + "9" * 96 + "...: it must be a valid integer"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_field_of_another_type_or_range_is_named_with_what_it_must_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=rf"^model/config.json: .*{re.escape(message)}"):
        parse(**changes)


def test_several_faults_are_reported_together() -> None:
    with pytest.raises(KitError, match="hidden_size='a': .*; vocab_size=-1: "):
        parse(hidden_size="a", vocab_size=-1)


@pytest.mark.parametrize("tp, rows", [(1, 152064), (2, 152064), (8, 152064), (5, 152065), (7, 152068)])
def test_the_embedding_is_padded_only_where_tp_does_not_divide_it(tp: int, rows: int) -> None:
    assert parse().padded_vocab_size(tp) == rows
    assert rows % tp == 0


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tp_that_divides_everything_is_taken(tp: int) -> None:
    parse().check_tensor_parallel(tp)


@pytest.mark.parametrize("tp, message", [(8, "num_attention_heads=28"), (7, "num_key_value_heads=4")])
def test_tp_that_divides_not_is_refused_with_those_that_do(tp: int, message: str) -> None:
    with pytest.raises(
        KitError, match=re.escape(f"TP={tp} does not divide {message} of this model: use TP in [1, 2, 4]")
    ):
        parse().check_tensor_parallel(tp)


def test_layers_must_divide_over_stages_and_chunks() -> None:
    assert parse().chunk_layers(4) == (7, 7, 7, 7)
    assert parse().chunk_layers(2, 7) == (2,) * 14
    with pytest.raises(KitError, match="28 layers cannot be divided by PP=4 x VPP=2 = 8: choose PP and VPP"):
        parse().chunk_layers(4, 2)
