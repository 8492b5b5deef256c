"""The loss of a model on windows of tokens."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import KitError
from common.evaluate.samples import Window
from common.inference.model import explain_out_of_memory
from common.log import logger

LOGITS_TOKENS = 1024  # whose logits are computed at once: 0.6 GB in float32 for a vocabulary of 152,000
LOG_INTERVAL_S = 60.0


@dataclass(frozen=True)
class Loss:
    """Sums over supervised tokens: of loss times weight, in nats, and of weights; and their number."""

    total: float = 0.0
    weight: float = 0.0
    tokens: int = 0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.total + other.total, self.weight + other.weight, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Nats per supervised token, as step 3 reports the loss."""
        return self.total / self.weight

    @property
    def perplexity(self) -> float:
        """e to the power of `mean`; infinite where a float cannot hold it."""
        return exp(self.mean) if self.mean < 700 else inf


@torch.inference_mode()
def loss_of(model: Any, windows: Sequence[Window], batch_size: int) -> Loss:
    """The loss of transformers' `model` on `windows`, in batches of similar length; the longest come first.

    Raises KitError where the loss is not a number, or the device lacks memory.
    """
    by_length = sorted(windows, key=lambda window: window.ids.size, reverse=True)
    found, done, logged_at = Loss(), 0, time.monotonic()
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        with explain_out_of_memory(f"decrease BATCH_SIZE={batch_size} or SEQ_LENGTH, or set DTYPE=bf16"):
            found += _batch_loss(model, batch)
        done += len(batch)
        if time.monotonic() - logged_at >= LOG_INTERVAL_S:
            logged_at = time.monotonic()
            logger.info("%d of %d windows, loss %.4f so far", done, len(windows), found.mean)
    if not abs(found.total) < inf:
        raise KitError(
            f"the loss is {found.total}: the weights hold values that are not finite, or DTYPE is too narrow"
        )
    return found


def _batch_loss(model: Any, windows: Sequence[Window]) -> Loss:
    ids, attention_mask, weights = (tensor.to(model.device) for tensor in _padded(windows))
    output = model.model(input_ids=ids[:, :-1], attention_mask=attention_mask, use_cache=False)
    used = weights > 0
    hidden, labels, weights = output.last_hidden_state[used], ids[:, 1:][used], weights[used]
    total = sum(float(each) for each in _losses(model.lm_head, hidden, labels, weights))
    return Loss(total, float(weights.double().sum()), labels.numel())


def _losses(head: Any, hidden: Tensor, labels: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """The sum of loss times weight of each LOGITS_TOKENS of `hidden` [n, h]."""
    for rows in torch.arange(len(labels), device=labels.device).split(LOGITS_TOKENS):
        losses = torch.nn.functional.cross_entropy(head(hidden[rows]).float(), labels[rows], reduction="none")
        yield (losses.double() * weights[rows]).sum()


def _padded(windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [b, s + 1] ids padded on the right, int64 [b, s] attention mask, float32 [b, s] weights of the labels."""
    size = max(window.ids.size for window in windows)
    ids = np.zeros((len(windows), size), np.int64)
    mask, weights = np.zeros((len(windows), size - 1), np.int64), np.zeros((len(windows), size - 1), np.float32)
    for row, window in enumerate(windows):
        ids[row, : window.ids.size] = window.ids
        mask[row, : window.weights.size], weights[row, : window.weights.size] = 1, window.weights
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(weights)
