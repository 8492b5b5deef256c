"""Checks that settings, model, platform and installed packages are compatible; reads no data and no checkpoint."""

from dataclasses import replace
from importlib.util import find_spec

from common.engine import transformer_engine
from common.engine.pipeline_layers import check_pipeline_layers
from common.engine.versions import first_version_with, installed_engine
from common.errors import KitError
from common.log import logger
from common.model.shape.config import QwenConfig
from common.platforms.base import Platform
from common.training.planning import determinism
from common.training.settings import TrainSettings
from common.training.settings.optimizer import OFFLOADED


def check_fit(settings: TrainSettings, platform: Platform, qwen: QwenConfig) -> None:
    """Raises KitError where the model or the platform does not support the settings.

    The estimate calls this for other machines too, so the packages installed here are left to check_packages.
    """
    qwen.check_trainable()
    qwen.check_tensor_parallel(settings.tp)
    check_pipeline_layers(qwen.chunk_layers(settings.pp, settings.vpp, settings.sizes.pipeline_layers), settings.vpp)
    if settings.async_save and (settings.ckpt_format or platform.checkpoint_format) == "torch":
        raise KitError("ASYNC_SAVE=true works with CKPT_FORMAT=torch_dist only: set ASYNC_SAVE=false")
    if settings.train_or_convert_ckpt == "train" and settings.seq_length > qwen.longest_sequence:
        raise KitError(
            f"SEQ_LENGTH={settings.seq_length} exceeds max_position_embeddings={qwen.longest_sequence}"
            " in config.json: use a shorter SEQ_LENGTH, or add YaRN (rope_scaling) as the model card describes"
        )
    if settings.memory_snapshot and platform.device != "cuda":
        raise KitError(f"MEMORY_SNAPSHOT=true needs a GPU, and the platform is {platform.name}: set it to false")
    if settings.tuner == "lora":
        check_lora(settings)
    freezes = settings.tuner == "lora" or settings.trainable or settings.freeze
    if freezes and settings.pp > 1 and qwen.tie_word_embeddings and not installed_engine().frozen_shared_embeddings:
        since = first_version_with(lambda megatron: megatron.frozen_shared_embeddings)
        raise KitError(
            f"PP={settings.pp} with frozen weights: this model ties its embeddings, which megatron-core before {since}"
            " cannot freeze on several stages: set PP=1"
        )
    check_layers(settings, platform)


def check_lora(settings: TrainSettings) -> None:
    """Raises KitError where adapters do not go with the settings."""
    if settings.optimizer_state in OFFLOADED:
        raise KitError(
            f"OPTIMIZER_STATE={settings.optimizer_state} with TUNER=lora: adapters have a state of megabytes: set it to"
            " fp32"
        )
    if settings.fused_products == "true" and settings.lora_config().adapts_mlp:
        raise KitError(
            "FUSED_PRODUCTS=true with TUNER=lora: adapters of the MLP add to what it does not write: set it to auto"
        )


def check_layers(settings: TrainSettings, platform: Platform) -> None:
    """Raises KitError where the selected layers do not support the settings."""
    determinism.check(settings)
    engine = (settings.transformer_impl or platform.transformer_impl) == "transformer_engine"
    isolating = isolating_settings(settings)
    if settings.cp > 1 and settings.seq_length % (2 * settings.cp * settings.tp):
        raise KitError(
            f"SEQ_LENGTH={settings.seq_length} cannot be divided by 2 x CP x TP = {2 * settings.cp * settings.tp}:"
            " use a multiple of that"
        )
    requires_engine = {
        f"FP8_FORMAT={settings.fp8_format}": settings.fp8_format != "none",
        "TP_COMM_OVERLAP=true": settings.tp_comm_overlap == "true",
    }
    for setting, enabled in requires_engine.items():
        if enabled and not engine:
            raise KitError(f"{setting} needs TRANSFORMER_IMPL=transformer_engine: change one of them")
    if settings.tp_comm_overlap == "true" and not (settings.tp > 1 and settings.sequence_parallel):
        raise KitError(
            f"TP_COMM_OVERLAP=true with TP={settings.tp} and SEQUENCE_PARALLEL={settings.sequence_parallel}: it needs"
            " TP above 1 and sequence parallelism, whose communication it overlaps"
        )
    if settings.core_attention != "auto" and engine and isolating and settings.cp == 1:
        raise KitError(
            f"CORE_ATTENTION={settings.core_attention} does not support {isolating[0]}=true with CP=1, which"
            " Transformer Engine's own attention does: set it to auto"
        )
    if settings.fused_products == "true":
        check_fused_products(settings, platform, engine=engine)
    if settings.optimizer_state == "bf16" and not platform.transformer_engine:
        raise KitError(f"OPTIMIZER_STATE=bf16 needs Transformer Engine, and {platform.name} has none: set it to fp32")
    if isolating and not engine and not platform.masked_attention:
        raise KitError(
            f"{isolating[0]}=true: attention on {platform.name} takes no mask, so each sample needs its own row:"
            f" set {isolating[0]}=false"
        )
    if settings.transformer_impl == "transformer_engine" and not platform.transformer_engine:
        raise KitError(
            f"TRANSFORMER_IMPL=transformer_engine, and {platform.name} has no Transformer Engine: set it to local"
        )


def with_packing(settings: TrainSettings, platform: Platform) -> TrainSettings:
    """`settings` with PACKING=auto decided: true for answers where layers and packages can; else logs why not."""
    if settings.packing is not None:
        return settings
    off = replace(settings, packing=False)
    if settings.train_mode == "pretrain" or settings.train_or_convert_ckpt != "train":
        return off
    packed = replace(settings, packing=True)
    if (settings.transformer_impl or platform.transformer_impl) == "local" and not platform.ran_on_hardware:
        logger.info(
            "PACKING=auto: off; the attention of local layers within samples was not run on %s hardware: PACKING=true"
            " does so", platform.name,
        )  # fmt: skip
        return off
    try:
        check_layers(packed, platform)
        check_packages(packed, platform)
    except KitError as error:
        check_layers(off, platform)  # what is refused without packing too is not its fault
        logger.info("PACKING=auto: off; %s", error)
        return off
    return packed


def check_fused_products(settings: TrainSettings, platform: Platform, *, engine: bool) -> None:
    """Raises KitError where matrix products with a fused SwiGLU do not support the settings."""
    if not platform.fused_kernels:
        raise KitError(f"FUSED_PRODUCTS=true needs an NVIDIA GPU, and this is {platform.name}: set it to auto")
    norms_since = first_version_with(lambda megatron: megatron.fused_residual_norms)
    conflicts = {
        f"PRECISION={settings.precision}": settings.precision != "bf16",
        f"FP8_FORMAT={settings.fp8_format}": settings.fp8_format != "none",
        "TP_COMM_OVERLAP=true": settings.tp_comm_overlap == "true",
        f"a megatron-core before {norms_since} under Transformer Engine's layers": engine
        and not installed_engine().fused_residual_norms,
    }
    for setting, present in conflicts.items():
        if present:
            raise KitError(f"FUSED_PRODUCTS=true is not supported with {setting}: set it to auto")


def isolating_settings(settings: TrainSettings) -> list[str]:
    """The names of the enabled settings that mask attention between the samples of a row."""
    return [name.upper() for name in ("packing", "reset_attention") if getattr(settings, name)]


def check_packages(settings: TrainSettings, platform: Platform) -> None:
    """Raises KitError where a setting needs a package that is missing here or too old.

    Run by the launcher before any rank starts; reads package metadata and import specs, and imports nothing.
    """
    if (settings.transformer_impl or platform.transformer_impl) == "transformer_engine":
        transformer_engine.check_installed()
        for setting in isolating_settings(settings) if settings.cp == 1 else ():
            transformer_engine.check_packed_sequences(setting)
    if settings.tp_comm_overlap == "true":
        transformer_engine.check_tp_comm_overlap()
    transformer_engine.check_fp8(settings.fp8_format, settings.fp8_recipe)
    transformer_engine.check_optimizer_state(settings.optimizer_state)
    kernels = {
        ("core_attention", "flash_attn"): ("flash_attn", "the vendor's build of it"),
        ("core_attention", "flash_attn_4"): ("flash_attn", "requirements/hopper.txt"),
        ("fused_products", "true"): ("quack", "requirements/hopper.txt"),
    }
    for (name, value), (module, source) in kernels.items():
        if getattr(settings, name) == value and find_spec(module) is None:
            raise KitError(
                f"{name.upper()}={value} needs {module}, which is not installed: install {source}, or set it to auto"
            )
