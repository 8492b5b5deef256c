"""The MLP's GEMMs with fused SwiGLU, by QuACK (github.com/Dao-AILab/quack, package quack-kernels).

Its kernels interleave gate and up: `both` has the two values of a column next to each other. They read the weight's
rows in that order (`concat_layout`), so the layout of weights and gradients does not change.
"""

from typing import Any

import torch


class QuackProducts:
    """GatedProducts for bf16 on Hopper GPUs; raises ImportError if quack is not installed.

    Each GEMM has a fixed tile shape, the best of sixteen for 0.5B, 1.5B, 3B and 7B (docs/benchmarks.md). There is no
    autotuning at the start of a run, so a resumed run computes the same as an uninterrupted one.
    """

    def __init__(self) -> None:
        from quack import gemm_interface
        from quack.gemm_config import GemmConfig

        self._quack = gemm_interface
        hopper: dict[str, Any] = {"device_capacity": 9, "is_dynamic_persistent": False}
        self._up = GemmConfig(tile_m=128, tile_n=192, pingpong=True, cluster_m=2, cluster_n=1, **hopper)
        self._down = GemmConfig(tile_m=128, tile_n=128, pingpong=True, cluster_m=1, cluster_n=2, **hopper)
        self._input = GemmConfig(tile_m=256, tile_n=192, pingpong=False, cluster_m=2, cluster_n=1, **hopper)

    def up(self, x: torch.Tensor, weight: torch.Tensor, both: torch.Tensor, activated: torch.Tensor) -> None:
        """As GatedProducts."""
        self._quack.gemm_gated(
            x, weight.t(), activation="swiglu", preact_out=both, postact_out=activated, concat_layout=("B",),
            config=self._up, dynamic_scheduler=True,
        )  # fmt: skip

    def down_gradient(
        self, d_out: torch.Tensor, weight: torch.Tensor, both: torch.Tensor, activated: torch.Tensor
    ) -> None:
        """As GatedProducts."""
        self._quack.gemm_dgated(
            d_out, weight, both, activation="swiglu", dx_out=both, postact_out=activated, config=self._down,
            dynamic_scheduler=True,
        )  # fmt: skip

    def input_gradient(self, d_both: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """As GatedProducts."""
        self._quack.gemm_tuned.fn(d_both, weight, out, config=self._input, concat_layout=("B",))

    def add_weight_gradient(self, total: torch.Tensor, d_both: torch.Tensor, x: torch.Tensor) -> None:
        """As GatedProducts."""
        self._quack.gemm_tuned.fn(
            d_both.t(), x, total, config=self._up, concat_layout=("out",), add_to_output=True, dynamic_scheduler=True
        )
