"""How much a run trains on at once and in all."""

import math
from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Batch size and length of the run."""

    micro_batch_size: int = option(2, "samples a GPU runs at once")
    global_batch_size: int = option(16, "samples in one step over all GPUs")
    epochs: float | None = option(None, "passes over the training data; this or TRAIN_ITERS")
    train_iters: int | None = option(None, "steps; this or EPOCHS")
    exit_interval: int | None = option(None, "save and stop at a step that is a multiple of it")
    exit_duration_min: float | None = option(None, "save and stop this many minutes after the command began")

    def check_batch(self, training: bool) -> None:
        """Raises KitError for values that contradict each other; a run that is `training` needs a length."""
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
