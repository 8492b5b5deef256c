"""Precision, layer implementation, kernels and activation recomputation."""

from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require
from common.training.settings.optimizer import BF16_MOMENTS


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """Precision and kernels."""

    precision: str = option("bf16", "bf16 keeps float32 master weights and gradients", ("bf16", "fp32"))
    fp8_format: str = option("none", "FP8 matrix products (Transformer Engine)", ("none", "hybrid", "e4m3"))
    fp8_recipe: str = option("tensorwise", "FP8 scaling", ("tensorwise", "delayed", "blockwise"))
    recompute: str = option("none", "activations recomputed in the backward pass", ("none", "selective", "full"))
    recompute_num_layers: int | None = option(None, "with full: recompute this many layers of each chunk; default: all")
    transformer_impl: str | None = option(
        None, "layer implementation; default: the platform's", ("transformer_engine", "local")
    )
    core_attention: str = option(
        "auto",
        "attention kernel; auto: the first of the platform's that works",
        ("auto", "flash_attn", "flash_attn_4", "sdpa"),
    )
    fused_products: str = option(
        "auto", "SwiGLU and loss fused into matrix products (QuACK); auto: where supported", ("auto", "true", "false")
    )
    deterministic: bool = option(False, "bitwise reproducible on the same GPUs, with slower kernels")

    def check_kernels(self, optimizer_state: str) -> None:
        """Raises KitError for values out of range, or in conflict with each other or OPTIMIZER_STATE."""
        layers = self.recompute_num_layers
        require(self, "recompute_num_layers", layers is None or layers >= 1, "it must be at least 1")
        if layers and self.recompute != "full":
            raise KitError(f"RECOMPUTE_NUM_LAYERS={layers} needs RECOMPUTE=full, not {self.recompute}")
        if self.precision != "bf16" and (self.fp8_format != "none" or optimizer_state in BF16_MOMENTS):
            raise KitError(
                f"FP8_FORMAT={self.fp8_format} and OPTIMIZER_STATE={optimizer_state} need PRECISION=bf16, not"
                f" {self.precision}"
            )
