"""Batch sizes and the length of a run."""

import math
from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Batch size and length of the run."""

    micro_batch_size: int = option(2, "samples per GPU in one forward pass")
    global_batch_size: int = option(16, "samples in one step, over all GPUs")
    epochs: float | None = option(None, "passes over the training data; set this or TRAIN_ITERS")
    train_iters: int | None = option(None, "training steps; set this or EPOCHS")
    exit_interval: int | None = option(None, "save and exit at the next step divisible by it")
    exit_duration_min: float | None = option(None, "save and exit this many minutes after the command started")

    def check_batch(self, training: bool) -> None:
        """Raises KitError for values out of range, and for `training` without exactly one of EPOCHS and TRAIN_ITERS."""
        for name in ("micro_batch_size", "global_batch_size"):
            require(self, name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("exit_interval", "train_iters"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, "it must be at least 1")
        limit = self.exit_duration_min
        require(self, "exit_duration_min", limit is None or limit > 0, "it must be above 0")
        require(self, "epochs", self.epochs is None or 0 < self.epochs < math.inf, "it must be a number above 0")
        if training and (self.epochs is None) == (self.train_iters is None):
            raise KitError(f"EPOCHS={self.epochs} and TRAIN_ITERS={self.train_iters}: set one of them")
