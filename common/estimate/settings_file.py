"""An estimated layout as a settings file for step 3."""

from collections.abc import Iterator

from common.errors import KitError
from common.estimate.gpus import MEASURED, Gpu
from common.estimate.layouts import Estimate
from common.training.settings import TrainSettings
from common.training.settings.optimizer import OFFLOADED

# Written always, as they make the layout; the others where they differ from the scripts' defaults.
LAYOUT = ("gpus", "nnodes", "tp", "pp", "micro_batch_size", "global_batch_size", "seq_length")
OTHERS = (
    "vpp", "pipeline_layers", "cp", "recompute", "recompute_num_layers", "precision", "optimizer_state",
    "transformer_impl", "fp8_format", "fp8_recipe", "tuner", "lora_rank", "lora_targets",
)  # fmt: skip


def settings_lines(one: Estimate, gpu: Gpu) -> Iterator[str]:
    """The lines of a file for SETTINGS; raises KitError if the layout does not fit."""
    if one.fits == "no":
        raise KitError(
            f"no layout fits: the best of them needs {one.largest.peak / 2**30:.1f} GiB per GPU, and {gpu.name} has"
            f" {gpu.memory_gib:g}: use more GPUs, OPTIMIZER_STATE=bf16 or cpu_bf16, or a smaller SEQ_LENGTH"
        )
    settings = one.settings
    yield f"# By `python -m common.estimate` for {settings.sizes.world_size} x {gpu.name}, {gpu.memory_gib:g} GiB each:"
    rate = f", {one.speed.tokens_per_second:,.0f} tokens/s" if one.speed else ""
    measured = gpu.name in MEASURED and settings.sizes.world_size == 1 and settings.optimizer_state not in OFFLOADED
    basis = "fitted to measurements of one GPU" if measured else "estimated, not measured"
    yield f"# {one.largest.peak / 2**30:.1f} GiB per GPU{' (tight)' * (one.fits == 'tight')}{rate} ({basis})."
    yield from layout_lines(settings)


def layout_lines(settings: TrainSettings, always: tuple[str, ...] = ()) -> Iterator[str]:
    """NAME=VALUE of what makes a layout, and of what its memory and speed depend on; defaults too of those `always`."""
    for name in LAYOUT:
        yield f"{name.upper()}={getattr(settings, name)}"
    for name in OTHERS:
        value = getattr(settings, name)
        default = getattr(TrainSettings, name, None) or False
        if value is not None and (name in always or value != default):
            yield f"{name.upper()}={str(value).lower() if isinstance(value, bool) else value}"
    if settings.train_mode != "pretrain":
        yield f"PACKING={str(bool(settings.packing)).lower()}"
        yield f"TRAIN_MODE={settings.train_mode}"
