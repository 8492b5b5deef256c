"""What a model is computed by: precision, layers, kernels, recomputation."""

from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """Precision and kernels."""

    precision: str = option("bf16", "bf16 has float32 master weights and gradients", ("bf16", "fp32"))
    fp8_format: str = option("none", "matrix products in FP8 (Transformer Engine)", ("none", "hybrid", "e4m3"))
    fp8_recipe: str = option("tensorwise", "how FP8 is scaled", ("tensorwise", "delayed", "blockwise"))
    recompute: str = option("none", "activations computed again in backward", ("none", "selective", "full"))
    recompute_num_layers: int | None = option(None, "with full: only this many layers of each chunk; default: all")
    transformer_impl: str | None = option(None, "layers; default: the platform's", ("transformer_engine", "local"))
    core_attention: str = option(
        "auto", "auto: the platform's first that works here", ("auto", "flash_attn", "flash_attn_4", "sdpa")
    )
    fused_products: str = option(
        "auto", "SwiGLU and loss inside matrix products, by QuACK; auto: where it works", ("auto", "true", "false")
    )
    deterministic: bool = option(False, "the same bits on the same GPUs, by slower kernels")

    def check_kernels(self, optimizer_state: str) -> None:
        """Raises KitError for values that contradict each other or OPTIMIZER_STATE."""
        layers = self.recompute_num_layers
        require(self, "recompute_num_layers", layers is None or layers >= 1, "it must be at least 1")
        if layers and self.recompute != "full":
            raise KitError(f"RECOMPUTE_NUM_LAYERS={layers} goes with RECOMPUTE=full, not {self.recompute}")
        if self.precision != "bf16" and (self.fp8_format != "none" or optimizer_state == "bf16"):
            raise KitError(
                f"FP8_FORMAT={self.fp8_format} and OPTIMIZER_STATE={optimizer_state} need PRECISION=bf16, not"
                f" {self.precision}"
            )
