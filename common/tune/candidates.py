"""The layouts worth a trial: those that fit by the estimate, its fastest first."""

from argparse import Namespace
from dataclasses import replace

from common.errors import KitError
from common.estimate.check import as_installed
from common.estimate.gpus import Gpu, gpu_of_device
from common.estimate.layouts import (
    LONG_ROW,
    RECOMPUTE,
    Estimate,
    EstimateSettings,
    estimate_all,
    without_needless_context,
)
from common.model.shape.config import QwenConfig
from common.platforms import available_memory
from common.platforms.base import Platform
from common.training.planning.devices import smallest_device
from common.training.settings import TrainSettings

# What a layout does not change; the rest of the estimate's settings takes every value.
FIXED = (
    "gpus", "nnodes", "seq_length", "global_batch_size", "pipeline_layers", "fp8_format", "fp8_recipe",
    "precision", "optimizer_state", "transformer_impl", "sequence_parallel", "fused_products", "train_mode", "packing",
    "tuner", "lora_rank", "lora_targets",
)  # fmt: skip
GIB = 2**30


def with_open_layout(arguments: Namespace) -> Namespace:
    """`arguments` of common.train at a layout that divides every batch, a single replica: a run's own is not tried.

    TP and CP stay, since settings that need them are checked with them.
    """
    world_size, share = arguments.gpus * arguments.nnodes, arguments.tp * arguments.cp
    if share < 1 or world_size % share:
        return arguments  # refused with the settings
    return Namespace(**{**vars(arguments), "pp": world_size // share, "vpp": 1, "micro_batch_size": 1})


def check_tunable(settings: TrainSettings) -> None:
    """Raises KitError for runs whose layouts cannot be tried here."""
    if settings.train_or_convert_ckpt != "train":
        raise KitError("TRAIN_OR_CONVERT_CKPT=convert has no layout to tune: set it to train")
    if settings.nnodes > 1:
        raise KitError(
            f"NNODES={settings.nnodes}: layouts are tried on one node: set NNODES=1 and GLOBAL_BATCH_SIZE to one node's"
            f" share, {settings.global_batch_size // settings.nnodes}, and keep TP and PP within a node"
        )
    if settings.train_mode == "dpo":
        raise KitError(
            "TRAIN_MODE=dpo: each layout would first compute the reference's log-probabilities of all data: tune"
            " TRAIN_MODE=finetune with the same model and SEQ_LENGTH, whose steps are alike"
        )


def find_device(settings: TrainSettings, platform: Platform) -> Gpu:
    """The GPUs of this machine, with their own memory; without rates where their type is unknown, as on a CPU.

    Raises KitError if torch cannot query the devices.
    """
    if platform.device != "cuda":
        return Gpu("CPU", platform, available_memory() / settings.gpus / GIB, 0, 0)
    device = smallest_device(settings.gpus)
    if device is None:
        raise KitError("torch cannot query the devices: `python -m common.doctor` says why")
    return gpu_of_device(*device, platform)


def candidates(
    settings: TrainSettings, qwen: QwenConfig, gpu: Gpu, number: int, *, even: bool = False
) -> list[Estimate]:
    """At most `number` layouts of TP, PP, VPP, CP, micro-batch and recomputation that fit, the fastest first.

    CP is that of `settings` with short rows. PIPELINE_LAYERS are theirs, or those that make the layout faster, unless
    its stages are to be `even`. Recomputation only saves memory, so a layout that fits without it is not tried with it.
    Raises KitError if none fits, or training would refuse them all.
    """
    settings = as_installed(settings, gpu.platform)
    fixed = {name: getattr(settings, name) for name in FIXED}
    fixed["cp"] = None if settings.seq_length >= LONG_ROW else settings.cp
    wanted = EstimateSettings(hf_model_path="-", gpu=gpu.name, **fixed)
    found, _ = estimate_all(wanted, qwen, gpu, even=even)
    fitting = [each for each in without_needless_context(found) if each.fits != "no"]
    if not fitting:
        raise KitError(
            f"no layout fits: the best needs {found[0].largest.peak / GIB:.1f} GiB per GPU by the estimate, and"
            f" {gpu.name} has {gpu.memory_gib:.1f}: use more GPUs, OPTIMIZER_STATE=bf16 or cpu_bf16, or a smaller"
            " SEQ_LENGTH"
        )
    return [one for one in fitting if not _recomputes_needlessly(one, fitting)][:number]


def _recomputes_needlessly(one: Estimate, fitting: list[Estimate]) -> bool:
    """Whether the layout also fits, and not tightly, with less recomputation."""
    less = RECOMPUTE[: RECOMPUTE.index(one.settings.recompute)]
    return any(
        other.fits == "yes" and other.settings.recompute in less and _sizes(other) == _sizes(one) for other in fitting
    )


def _sizes(one: Estimate) -> tuple[int, ...]:
    return one.settings.tp, one.settings.pp, one.settings.vpp, one.settings.cp, one.settings.micro_batch_size


def with_layout(settings: TrainSettings, one: Estimate) -> TrainSettings:
    """`settings` at the layout of `one`."""
    names = ("tp", "pp", "vpp", "pipeline_layers", "cp", "micro_batch_size", "recompute", "recompute_num_layers")
    return replace(settings, **{name: getattr(one.settings, name) for name in names})
