"""Adam, the learning rate schedule, and the handling of bad steps."""

from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require

OFFLOADED = ("cpu", "cpu_bf16")  # OPTIMIZER_STATE in host memory
BF16_MOMENTS = ("bf16", "cpu_bf16")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer."""

    # None: the default is TRAIN_MODE's (mode_defaults.py), taken before any check
    lr: float = option(None, "peak learning rate; default: 1e-5")
    min_lr: float = option(None, "final learning rate; default: a tenth of LR")
    lr_warmup_iters: int = option(None, "steps of linear warm-up from 0, instead of the fraction")
    lr_warmup_fraction: float = option(None, "warm-up as a fraction of the run; default: finetune 0.03, pretrain 0.01")
    lr_decay_style: str = option(
        "cosine", "shape of the learning rate decay", ("cosine", "linear", "constant", "inverse-square-root", "WSD")
    )
    lr_wsd_decay_iters: int | None = option(None, "with WSD: steps at the end in which the learning rate falls")
    lr_wsd_decay_style: str = option(
        "exponential",  # Megatron-LM's default, and the decay of the WSD paper (arXiv 2404.06395)
        "with WSD: shape of that fall",
        ("exponential", "linear", "cosine", "minus_sqrt"),
    )
    weight_decay: float = option(0.1, "not applied to norms and biases")
    adam_beta1: float = option(0.9)
    adam_beta2: float = option(0.95)
    adam_eps: float = option(1e-8)
    clip_grad: float = option(1.0, "maximum gradient norm; 0: no clipping")
    optimizer_state: str = option(
        "fp32",
        "bf16: Adam's moments in bf16, 12 bytes per parameter, not 18; cpu: in host memory, 6, and 12 there; cpu_bf16:"
        " both, 6 and 6",
        ("fp32", "bf16", *OFFLOADED),
    )
    max_bad_steps: int = option(
        5, "stop after this many consecutive steps with a non-finite loss or gradient; 0: never"
    )
    skip_grad_norm: float | None = option(None, "skip steps with a larger gradient norm")

    def check_optimizer(self) -> None:
        """Raises KitError for values out of range."""
        for name in ("lr_warmup_iters", "weight_decay", "clip_grad", "max_bad_steps"):
            require(self, name, getattr(self, name) >= 0, "it must not be negative")
        for name in ("adam_eps", "skip_grad_norm"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "it must be above 0")
        require(self, "lr_warmup_fraction", 0 <= self.lr_warmup_fraction < 1, "it must be at least 0 and below 1")
        one = not (self.lr_warmup_iters and self.lr_warmup_fraction)
        require(self, "lr_warmup_fraction", one, f"LR_WARMUP_ITERS={self.lr_warmup_iters} is set too: set one of them")
        self._check_decay()
        for name in ("adam_beta1", "adam_beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "it must be at least 0 and below 1")
        require(self, "min_lr", 0 <= self.min_lr <= self.lr, f"it must lie between 0 and LR={self.lr}")

    def _check_decay(self) -> None:
        """Raises KitError unless WSD, and it alone, has the length of its decay."""
        iters, style = self.lr_wsd_decay_iters, self.lr_decay_style
        require(self, "lr_wsd_decay_iters", iters is None or iters >= 1, "it must be at least 1")
        if style == "WSD" and iters is None:
            raise KitError(
                "LR_DECAY_STYLE=WSD needs the length of its decay: set LR_WSD_DECAY_ITERS, as to a tenth of the steps"
            )
        if style != "WSD" and iters is not None:
            raise KitError(
                f"LR_WSD_DECAY_ITERS={iters} has no effect with LR_DECAY_STYLE={style}: leave it empty, or set"
                " LR_DECAY_STYLE=WSD"
            )
