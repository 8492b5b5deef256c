"""YaRN, Qwen2.5's way to sequences longer than it was trained on: other frequencies, and a sharper softmax.

Source: arXiv 2309.00071, sections 3.2 and 3.4; the same numbers as `transformers` modeling_rope_utils.py gives.
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
        """Positions that the model reaches with it."""
        return int(self.factor * self.original_max_position_embeddings)

    @property
    def softmax_factor(self) -> float:
        """What multiplies the softmax's scale: the square of the factor by which queries and keys grow."""
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return factor * factor


def yarn_frequencies(yarn: Yarn, head_dim: int, rope_theta: float) -> torch.Tensor:
    """[head_dim / 2] float32: each pair's frequency. Fast pairs keep theirs, slow ones are divided by the factor.

    Between the pairs that turn `beta_fast` and `beta_slow` times over the original length, one fades into the other.
    """
    import torch  # reading a config.json needs none

    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32)
    kept = 1.0 / rope_theta ** (pairs / head_dim)

    def pair_of(turns: float) -> float:
        length = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope_theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), head_dim - 1)
    width = high - low or 0.001
    faded = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return kept * (1 - faded) + kept / yarn.factor * faded
