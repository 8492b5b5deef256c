"""YaRN, Qwen2.5's context extension: interpolated RoPE frequencies and a softmax temperature.

Source: arXiv 2309.00071, sections 3.2 and 3.4; the same values as `transformers` modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Yarn:
    """The fields of `rope_scaling` in config.json, under its names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def max_position_embeddings(self) -> int:
        """The extended context length."""
        return int(self.factor * self.original_max_position_embeddings)

    @property
    def softmax_factor(self) -> float:
        """The factor of the softmax scale: the square of the attention factor, which scales queries and keys."""
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return factor * factor


def yarn_frequencies(yarn: Yarn, head_dim: int, rope_theta: float) -> torch.Tensor:
    """float32 [head_dim / 2]: the frequency of each pair. High ones are unchanged, low ones divided by the factor.

    Between the pairs with `beta_fast` and `beta_slow` rotations over the original length, it is a linear blend.
    """
    import torch  # not needed to read a config.json

    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32)
    inv_freq = 1.0 / rope_theta ** (pairs / head_dim)

    def pair_of(rotations: float) -> float:
        length = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope_theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), head_dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inv_freq * (1 - ramp) + inv_freq / yarn.factor * ramp
