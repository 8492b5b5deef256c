"""Megatron-Core's own fields by name: read, typed, refused, and given to its configs."""

import argparse
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from common.engine.config_fields import fields_of
from common.engine.overrides import OWNERS, describe_overrides, join_words, named_refusals, overrides
from common.errors import KitError
from common.model import build
from common.model.shape.config import QwenConfig
from common.model.shape.options import ModelOptions
from common.platforms import PLATFORMS
from common.settings import add_options, from_namespace, to_flags
from common.training.settings import TrainSettings
from common.training.state import data_parallel, optimizer
from common.training.state.optimizer import optimizer_config

CLASSES = {"transformer": TransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}
QWEN = QwenConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=16, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=64, head_dim=4,
    dtype="bfloat16",
)  # fmt: skip
RUN = ["--save-checkpoint-path=s", "--dataset-path=d", "--epochs=1"]


def settings(*words: str) -> TrainSettings:
    parser = argparse.ArgumentParser()
    add_options(parser, TrainSettings)
    return from_namespace(TrainSettings, parser.parse_args(join_words([*RUN, *words])))


def test_several_words_a_field_and_several_fields_are_read() -> None:
    words = "--mcore.transformer.recompute_modules core_attn mlp --lr 1e-4 --mcore.ddp.bucket_size=1000 --seed 1"
    read = settings(*words.split())
    assert (read.lr, read.seed) == (1e-4, 1)
    assert overrides(read.mcore) == {
        "transformer": {"recompute_modules": ["core_attn", "mlp"]}, "ddp": {"bucket_size": 1000}, "optimizer": {},
    }  # fmt: skip
    assert settings(*to_flags(read)) == read  # as the launcher gives them to its ranks


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("transformer.bias_activation_fusion=false", False),
        ("transformer.recompute_modules=mlp", ["mlp"]),
        ("transformer.num_microbatches_with_partial_activation_checkpoints=3", 3),
        ("transformer.num_microbatches_with_partial_activation_checkpoints=none", None),
        ("ddp.check_for_nan_in_grad=TRUE", True),
        ("ddp.bucket_size=-1", -1),
        ("optimizer.sgd_momentum=0.5", 0.5),
        ("optimizer.barrier_with_L1_time=false", False),
    ],
)
def test_a_value_has_the_type_of_its_field(text: str, value: Any) -> None:
    section, _, rest = text.partition(".")
    read = overrides((text,))[section][rest.partition("=")[0]]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transfomer.recompute_modules=mlp", "give --mcore.SECTION.FIELD VALUE, where SECTION is one of transformer,"),
        ("transformer=1", "give --mcore.SECTION.FIELD VALUE"),
        ("transformer.recompute_module=mlp", "has no such field; did you mean recompute_modules"),
        ("ddp.bucket_size=40M", "--mcore.ddp.bucket_size 40M: it takes int, none"),
        ("ddp.bucket_size=", "--mcore.ddp.bucket_size : it takes int, none"),
        ("ddp.check_for_nan_in_grad=1", "it takes bool"),
        ("ddp.bucket_size=1 2", "it takes int, none"),
        ("transformer.num_layers=4", "--mcore.transformer.num_layers is set by the model's config.json"),
        ("transformer.num_moe_experts=8", "is set by the model's config.json"),
        ("transformer.fp8=hybrid", "is set by FP8_FORMAT: change it there"),
        ("optimizer.adam_beta2=0.95", "is set by ADAM_BETA2: change it there"),
        ("ddp.grad_reduce_in_fp32=false", "is set by the kit, which trains and saves correctly only with that value"),
        ("transformer.activation_func=gelu", "cannot be set on the command line"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(KitError, match=re.escape(message)):
        overrides((text,))


@pytest.mark.parametrize("section", CLASSES)
def test_the_fields_are_those_of_the_installed_classes(section: str) -> None:
    assert fields_of(section).keys() == {field.name for field in dataclasses.fields(CLASSES[section])}


@pytest.mark.parametrize("section", CLASSES)
def test_what_a_setting_of_the_kit_sets_is_an_existing_field(section: str) -> None:
    """In some version: a name that none has would protect nothing."""
    fields = fields_of(section)
    found = {
        name: [key for key in fields if key == name or key.startswith(name.rstrip("*"))] for name in OWNERS[section]
    }
    missing = {name for name, keys in found.items() if not keys}
    assert missing <= {
        "use_custom_fsdp", "use_megatron_fsdp", "num_distributed_optimizer_instances", "is_hybrid_model", "mtp_*",
        "hetereogenous_*", "heterogeneous_*", "linear_*", "experimental_*", "softmax_type", "window_*", "no_rope_freq",
        "mamba_*", "pipeline_model_parallel_layout", "fp8_recipe", "fused_single_qkv_rope", "transformer_impl",
        "align_param_gather", "optimizer_cpu_offload", "optimizer_offload_fraction", "gradient_reduce_div_fusion",
        "data_parallel_sharding_strategy", "store_param_remainders", "fp8_param_gather", "rotary_*", "account_for_*",
    }  # fmt: skip


def test_fields_that_the_kit_sets_are_refused_but_for_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that build or the training state sets must be in OWNERS, or an override would replace it silently."""
    given: dict[str, set[str]] = {}

    def record(section: str) -> Callable[..., None]:
        return lambda **fields: given.update({section: set(fields)})

    monkeypatch.setattr(build, "TransformerConfig", record("transformer"))
    monkeypatch.setattr(optimizer, "OptimizerConfig", record("optimizer"))
    monkeypatch.setattr(data_parallel, "DistributedDataParallelConfig", record("ddp"))
    parsed = settings("--recompute=full")
    options = ModelOptions(precision="bf16", transformer_impl="local", recompute="full")
    build.transformer_config(QWEN, parsed.sizes, options, PLATFORMS["cpu"])
    optimizer.optimizer_config(parsed)
    data_parallel.wrap_model([], parsed)
    free = {name: fields - owned(name, fields) for name, fields in given.items()}
    assert free == {
        # performance alone; activation_func cannot be written on a command line
        "transformer": {"activation_func", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion",
                        "persist_layer_norm"},
        "ddp": {"bucket_size"}, "optimizer": set(),
    }  # fmt: skip


def owned(section: str, names: set[str]) -> set[str]:
    beginnings = tuple(name[:-1] for name in OWNERS[section] if name.endswith("*"))
    return {name for name in names if name in OWNERS[section] or name.startswith(beginnings or ("*",))}


def test_they_reach_the_config_and_the_log() -> None:
    parsed = settings("--mcore.optimizer.log_num_zeros_in_grad", "true")
    assert optimizer_config(parsed).log_num_zeros_in_grad is True
    assert optimizer_config(settings()).log_num_zeros_in_grad is False
    assert list(describe_overrides(parsed.mcore)) == ["megatron-core's optimizer config: log_num_zeros_in_grad = True"]


def test_what_megatron_core_refuses_is_reported_with_the_flag() -> None:
    with (
        pytest.raises(KitError, match=r"megatron-core refuses --mcore.ddp.bucket_size=7: no"),
        named_refusals(("ddp.bucket_size=7",)),
    ):
        raise AssertionError("no")
    with pytest.raises(AssertionError), named_refusals(()):  # a bug of the kit keeps its traceback
        raise AssertionError
