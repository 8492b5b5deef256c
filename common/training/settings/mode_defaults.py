"""Defaults that depend on TRAIN_MODE, of settings that are not given: the one place where they are decided."""

from fractions import Fraction
from functools import cache
from typing import Any

# LR and MIN_LR: Pai-Megatron-Patch, examples/qwen2_5/README.md, which continues from Qwen2.5's weights in both modes. A
# rate that falls to a tenth: Qwen2.5's report (arXiv 2412.15115, 4.1) and Qwen's (arXiv 2309.16609, 2.4). That
# fine-tuning warms up: Qwen's report, 3.1. ADAM_BETA2 and WEIGHT_DECAY are the reports' in both modes.
BY_MODE: dict[str, dict[str, float]] = {
    "finetune": {"lr": 1e-5, "lr_warmup_fraction": 0.03},
    "pretrain": {"lr": 1e-5, "lr_warmup_fraction": 0.01},
    # TRL's DPOConfig (trl/trainer/dpo_config.py); the warm-up of alignment-handbook's recipes for Zephyr.
    "dpo": {"lr": 1e-6, "lr_warmup_fraction": 0.1},
}
LORA = 10  # times that rate: Thinking Machines, "LoRA Without Regret" (2025)
FROM_RANDOM = 3e-4  # the highest rate of Qwen's own pre-training (arXiv 2309.16609, 2.4)


def defaults_of(settings: Any) -> dict[str, Any]:
    """The value that each setting below has if it is not given, whether it is or not.

    LR_WARMUP_ITERS, 0 included, leaves no room for the fraction.
    """
    own = _own(settings)
    lr = own["lr"] if settings.lr is None else settings.lr
    return {
        "lr": own["lr"],
        "min_lr": _times(lr, Fraction(1, 10)),
        "lr_warmup_fraction": own["lr_warmup_fraction"] if settings.lr_warmup_iters is None else 0.0,
        "lr_warmup_iters": 0,
    }


def taken(settings: Any) -> dict[str, Any]:
    """The settings that have their mode's default, for the log."""
    found = {"packing": settings.train_mode != "pretrain", **_own(settings)}
    found["min_lr"] = defaults_of(settings)["min_lr"]
    return {name: value for name, value in found.items() if value and getattr(settings, name) == value}


def _own(settings: Any) -> dict[str, float]:
    own = BY_MODE.get(settings.train_mode, BY_MODE["finetune"])
    return {**own, "lr": _times(own["lr"], LORA)} if settings.tuner == "lora" else own


@cache
def _times(rate: float, factor: Fraction | int) -> float:
    """The product as it is written in decimals: 1e-6 for a tenth of 1e-5."""
    return float(Fraction(str(rate)) * factor)
