"""Overrides of Megatron-Core's config fields: `--mcore.transformer.recompute_modules core_attn mlp`.

They are passed unchanged to TransformerConfig (`transformer`), DistributedDataParallelConfig (`ddp`) and
OptimizerConfig (`optimizer`) of the installed version. Fields that the kit sets itself are refused, with the setting.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from common.engine.config_fields import SECTIONS, FieldType, fields_of
from common.engine.versions import installed_engine
from common.errors import KitError

PREFIX = "--mcore."
SHAPE = "the model's config.json"
CORRECTNESS = "the kit, which trains and saves correctly only with that value"
# Fields that the kit sets, and what decides them; a trailing * is a wildcard.
OWNERS: dict[str, dict[str, str]] = {
    "transformer": {
        **dict.fromkeys(
            ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
             "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias",
             "qk_layernorm", "gated_linear_unit", "softmax_scale", "init_method_std", "attention_dropout",
             "hidden_dropout", "rotary_*", "moe_*", "num_moe_*", "mtp_*", "multi_latent_attention", "is_hybrid_model",
             "hetereogenous_*", "heterogeneous_*", "linear_*", "experimental_*", "softmax_type", "window_*",
             "no_rope_freq", "mamba_*"),
            SHAPE,
        ),
        **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16"), "PRECISION"),
        "tensor_model_parallel_size": "TP", "pipeline_model_parallel_size": "PP",
        "virtual_pipeline_model_parallel_size": "VPP", "context_parallel_size": "CP",
        "sequence_parallel": "SEQUENCE_PARALLEL", "tp_comm_overlap": "TP_COMM_OVERLAP",
        **dict.fromkeys(
            ("pipeline_model_parallel_layout", "num_layers_in_first_*", "num_layers_in_last_*", "account_for_*"),
            "PIPELINE_LAYERS",
        ),
        "deterministic_mode": "DETERMINISTIC", "fp8": "FP8_FORMAT", "fp8_recipe": "FP8_RECIPE",
        **dict.fromkeys(("recompute_granularity", "recompute_method", "recompute_num_layers"), "RECOMPUTE"),
        **dict.fromkeys(
            ("overlap_p2p_comm", "batch_p2p_comm", "deallocate_pipeline_outputs", "calculate_per_token_loss",
             "use_cpu_initialization", "perform_initialization", "expert_*", "fused_single_qkv_rope",
             "transformer_impl", "gradient_accumulation_fusion", "apply_rope_fusion"),
            CORRECTNESS,
        ),
    },
    "ddp": {
        "overlap_grad_reduce": "OVERLAP_GRAD_REDUCE", "overlap_param_gather": "OVERLAP_PARAM_GATHER",
        **dict.fromkeys(
            ("grad_reduce_in_fp32", "use_distributed_optimizer", "average_in_collective", "use_custom_fsdp",
             "use_megatron_fsdp", "data_parallel_sharding_strategy", "num_distributed_optimizer_instances",
             "fp8_param_gather", "align_param_gather", "gradient_reduce_div_fusion"),
            CORRECTNESS,
        ),
    },
    "optimizer": {
        "lr": "LR", "min_lr": "MIN_LR", "weight_decay": "WEIGHT_DECAY", "adam_beta1": "ADAM_BETA1",
        "adam_beta2": "ADAM_BETA2", "adam_eps": "ADAM_EPS", "clip_grad": "CLIP_GRAD",
        **dict.fromkeys(("bf16", "fp16", "params_dtype"), "PRECISION"),
        **dict.fromkeys(
            ("use_precision_aware_optimizer", "store_param_remainders", "main_grads_dtype", "main_params_dtype",
             "exp_avg_dtype", "exp_avg_sq_dtype", "optimizer_cpu_offload", "optimizer_offload_fraction"),
            "OPTIMIZER_STATE"),
        **dict.fromkeys(("optimizer", "use_distributed_optimizer", "overlap_param_gather", "fp8_recipe", "loss_scale"),
                        CORRECTNESS),
    },
}  # fmt: skip


def join_words(words: Sequence[str]) -> list[str]:
    """The command line with each `--mcore.SECTION.FIELD VALUE ...` as one word, `--mcore=SECTION.FIELD=VALUE ...`."""
    joined: list[str] = []
    collecting = False
    for word in words:
        if word.startswith(PREFIX):
            name, _, value = word.removeprefix(PREFIX).partition("=")
            joined.append(f"--mcore={name}={value}")
            collecting = "=" not in word
        elif word.startswith("--") or not collecting:
            joined.append(word)
            collecting = False
        else:
            joined[-1] += word if joined[-1].endswith("=") else f" {word}"
    return joined


def overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The overrides of each section; raises KitError for a field that is unknown or the kit's, or a wrong value."""
    found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for text in texts:
        name, _, value = text.partition("=")
        section, _, key = name.partition(".")
        if section not in SECTIONS or not key:
            raise KitError(
                f"{PREFIX}{name}: give {PREFIX}SECTION.FIELD VALUE, where SECTION is one of {', '.join(SECTIONS)}"
            )
        found[section][key] = _read(name, value.split(), _known(section, key))
    return found


def _known(section: str, key: str) -> FieldType:
    """The type of a field that may be set."""
    fields, flag = fields_of(section), f"{PREFIX}{section}.{key}"
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=3)
        suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
        raise KitError(f"{flag}: megatron-core {installed_engine().release} has no such field{suggestion}")
    for owned, owner in OWNERS[section].items():
        if key == owned or (owned.endswith("*") and key.startswith(owned[:-1])):
            raise KitError(f"{flag} is set by {owner}: change it there")
    if not fields[key].readable:
        raise KitError(f"{flag} cannot be set on the command line: its type is not a number, string, boolean or list")
    return fields[key]


def _read(name: str, words: list[str], kind: FieldType) -> Any:
    """The value of a field."""
    one = words[0] if len(words) == 1 else None
    if one is not None and one.lower() == "none" and kind.optional:
        return None
    if one in kind.choices:
        return one
    for scalar in kind.scalars if one is not None else ():
        value = _scalar(str(one), scalar)
        if value is not None:
            return value
    values = [next((v for v in (_scalar(word, item) for item in kind.items) if v is not None), None) for word in words]
    if not kind.items or not values or None in values:
        raise KitError(f"{PREFIX}{name} {' '.join(words)}: it takes {kind}")
    return values


def _scalar(word: str, kind: type) -> Any:
    """`word` as `kind`; None if it is not one."""
    if kind is bool:
        return {"true": True, "false": False}.get(word.lower())
    try:
        return kind(word)
    except ValueError:
        return None


def describe_overrides(texts: Sequence[str]) -> Iterator[str]:
    """A line for each override, for the log."""
    for section, fields in overrides(texts).items():
        for key, value in fields.items():
            yield f"megatron-core's {section} config: {key} = {value!r}"


@contextmanager
def named_refusals(texts: Sequence[str]) -> Iterator[None]:
    """Turns errors of Megatron-Core's configs into a KitError that lists the overrides, if there are any."""
    try:
        yield
    except (ValueError, AssertionError, TypeError, NotImplementedError) as error:
        if not texts:
            raise
        raise KitError(f"megatron-core refuses {', '.join(PREFIX + text for text in texts)}: {error}") from error
