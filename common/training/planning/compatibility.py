"""Whether settings, model, platform and installed packages go together: told without torch, data or checkpoints."""

from importlib.util import find_spec

from common.engine import transformer_engine
from common.engine.patches import joins_norms
from common.engine.pipeline_layers import check_pipeline_layers
from common.engine.versions import first_version_with
from common.errors import KitError
from common.model.shape.config import QwenConfig
from common.platforms.base import Platform
from common.training.planning import determinism
from common.training.settings import TrainSettings


def check_fit(settings: TrainSettings, platform: Platform, qwen: QwenConfig) -> None:
    """Raises KitError where the settings ask for what this model or this platform does not have.

    The estimate asks it too, for other machines: what is installed here is check_packages' to judge.
    """
    qwen.check_trainable()
    qwen.check_tensor_parallel(settings.tp)
    check_pipeline_layers(qwen.chunk_layers(settings.pp, settings.vpp, settings.sizes.pipeline_layers), settings.vpp)
    if settings.async_save and (settings.ckpt_format or platform.checkpoint_format) == "torch":
        raise KitError("ASYNC_SAVE=true works with CKPT_FORMAT=torch_dist only: set ASYNC_SAVE=false")
    if settings.train_or_convert_ckpt == "train" and settings.seq_length > qwen.longest_sequence:
        raise KitError(
            f"SEQ_LENGTH={settings.seq_length} is over max_position_embeddings={qwen.longest_sequence}"
            " of config.json: use a shorter SEQ_LENGTH, or give the model YaRN (rope_scaling) as its card says"
        )
    check_layers(settings, platform)


def check_layers(settings: TrainSettings, platform: Platform) -> None:
    """Raises KitError for what the kind of layers that the run uses cannot do."""
    determinism.check(settings)
    engine = (settings.transformer_impl or platform.transformer_impl) == "transformer_engine"
    apart = kept_apart(settings)
    if settings.cp > 1 and not engine:
        raise KitError(f"CP={settings.cp} needs TRANSFORMER_IMPL=transformer_engine, whose attention can: set CP=1")
    if settings.cp > 1 and apart:
        raise KitError(f"CP={settings.cp} and {apart[0]}=true do not go together here: set CP=1 or {apart[0]}=false")
    if settings.cp > 1 and settings.seq_length % (2 * settings.cp * settings.tp):
        raise KitError(
            f"SEQ_LENGTH={settings.seq_length} cannot be divided by 2 x CP x TP = {2 * settings.cp * settings.tp}:"
            " use a multiple of it"
        )
    needs_engine = {
        f"FP8_FORMAT={settings.fp8_format}": settings.fp8_format != "none",
        "TP_COMM_OVERLAP=true": settings.tp_comm_overlap,
    }
    for setting, wanted in needs_engine.items():
        if wanted and not engine:
            raise KitError(f"{setting} needs TRANSFORMER_IMPL=transformer_engine: change one of them")
    if settings.tp_comm_overlap and not (settings.tp > 1 and settings.sequence_parallel):
        raise KitError(
            f"TP_COMM_OVERLAP=true with TP={settings.tp} and SEQUENCE_PARALLEL={settings.sequence_parallel}: it needs"
            " TP above 1, and sequence parallelism, whose sends it overlaps"
        )
    if settings.core_attention != "auto" and engine and (settings.cp > 1 or apart):
        cause = f"{apart[0]}=true" if apart else f"CP={settings.cp}"
        raise KitError(
            f"CORE_ATTENTION={settings.core_attention} cannot do {cause}, Transformer Engine's own can: set it to auto"
        )
    if settings.fused_products == "true":
        check_fused_products(settings, platform, engine=engine)
    if settings.optimizer_state == "bf16" and not platform.transformer_engine:
        raise KitError(f"OPTIMIZER_STATE=bf16 needs Transformer Engine, and {platform.name} has none: set it to fp32")
    if apart and not engine and not platform.masked_attention:
        raise KitError(
            f"{apart[0]}=true: attention takes no mask on {platform.name}, so samples need rows of their own:"
            f" set {apart[0]}=false"
        )
    if settings.transformer_impl == "transformer_engine" and not platform.transformer_engine:
        raise KitError(
            f"TRANSFORMER_IMPL=transformer_engine, and {platform.name} has no Transformer Engine: set it to local"
        )


def check_fused_products(settings: TrainSettings, platform: Platform, *, engine: bool) -> None:
    """Raises KitError for what matrix products with SwiGLU inside cannot do."""
    if not platform.fused_kernels:
        raise KitError(f"FUSED_PRODUCTS=true needs an NVIDIA GPU, and this is {platform.name}: set it to auto")
    norms_since = first_version_with(lambda megatron: megatron.fused_residual_norms)
    against = {
        f"PRECISION={settings.precision}": settings.precision != "bf16",
        f"FP8_FORMAT={settings.fp8_format}": settings.fp8_format != "none",
        "TP_COMM_OVERLAP=true": settings.tp_comm_overlap,
        f"a megatron-core before {norms_since} under Transformer Engine's layers": engine and not joins_norms(),
    }
    for setting, given in against.items():
        if given:
            raise KitError(f"FUSED_PRODUCTS=true does not go together with {setting}: set it to auto")


def kept_apart(settings: TrainSettings) -> list[str]:
    """The settings by which the samples of a row are kept apart, as they are written."""
    return [name.upper() for name in ("packing", "reset_attention") if getattr(settings, name)]


def check_packages(settings: TrainSettings, platform: Platform) -> None:
    """Raises KitError where a setting needs a package that is not installed here, or a later version of it.

    Told by the launcher, before any process: from package metadata, and from where an import would look.
    """
    if (settings.transformer_impl or platform.transformer_impl) == "transformer_engine":
        transformer_engine.check_engine()
        for setting in kept_apart(settings):
            transformer_engine.check_packed_sequences(setting)
    if settings.tp_comm_overlap:
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
            raise KitError(f"{name.upper()}={value}, and {module} is not there: install {source}, or set it to auto")
