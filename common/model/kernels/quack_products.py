"""The MLP's products with SwiGLU in them, by QuACK (github.com/Dao-AILab/quack), the package quack-kernels.

Its kernels want gate and up side by side: `both` has the gate's and up's value of a column next to each other, and the
weight's rows are read in that order (`concat_layout`), so weights and their gradients stay as they are.
"""

from typing import Any

import torch


class QuackProducts:
    """GatedProducts for bf16 on Hopper GPUs; raises ImportError where quack is not installed.

    One tile shape for each product, the best of sixteen at the shapes of 0.5B, 1.5B, 3B and 7B (docs/benchmarks.md):
    chosen here and not as a run begins, so that a run that goes on computes what it would have.
    """

    def __init__(self) -> None:
        from quack import gemm_interface
        from quack.gemm_config import GemmConfig

        self._quack = gemm_interface
        hopper: dict[str, Any] = {"device_capacity": 9, "is_dynamic_persistent": False}
        self._up = GemmConfig(tile_m=128, tile_n=192, pingpong=True, cluster_m=2, cluster_n=1, **hopper)
        self._down = GemmConfig(tile_m=128, tile_n=128, pingpong=True, cluster_m=1, cluster_n=2, **hopper)
        self._input = GemmConfig(tile_m=256, tile_n=192, pingpong=False, cluster_m=2, cluster_n=1, **hopper)

    def up(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As GatedProducts."""
        both, activated = self._quack.gemm_gated(
            x, weight.t(), activation="swiglu", concat_layout=("B",), config=self._up, dynamic_scheduler=True
        )
        return both, activated

    def down_gradient(
        self, d_out: torch.Tensor, weight: torch.Tensor, both: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As GatedProducts."""
        d_both, activated = self._quack.gemm_dgated(
            d_out, weight, both, activation="swiglu", dx_out=both, config=self._down, dynamic_scheduler=True
        )
        return d_both, activated

    def input_gradient(self, d_both: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As GatedProducts."""
        out = d_both.new_empty(len(d_both), weight.shape[1])
        self._quack.gemm_tuned.fn(d_both, weight, out, config=self._input, concat_layout=("B",))
        return out

    def add_weight_gradient(self, total: torch.Tensor, d_both: torch.Tensor, x: torch.Tensor) -> None:
        """As GatedProducts."""
        self._quack.gemm_tuned.fn(
            d_both.t(), x, total, config=self._up, concat_layout=("out",), add_to_output=True, dynamic_scheduler=True
        )
