"""One logger for the kit: rank 0 speaks; other ranks speak only to warn, and say who they are."""

import logging
import os
import sys
import time
import warnings
from datetime import timedelta
from types import TracebackType

logger = logging.getLogger("kit")


BEAT_S = 60.0


class Progress:
    """How far a work of `total_bytes` is: a bar where a person watches, else a line in the log once a minute.

    A context manager.
    """

    def __init__(self, total_bytes: int) -> None:
        from tqdm import tqdm  # who only logs needs no package

        watched = sys.stderr.isatty()
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, leave=False, disable=not watched)
        self._total, self._watched = total_bytes, watched
        self._done = self._skipped = self._rows = 0
        self._started = self._told = time.monotonic()

    def skip(self, number: int) -> None:
        """So many bytes need no work."""
        self._skipped += number
        self.update(number)

    def advance(self, number: int, rows: int) -> None:
        """So many bytes more are done, which held `rows` rows."""
        self._rows += rows
        self.update(number)

    def update(self, number: int) -> None:
        """So many bytes more are done."""
        self._done += number
        self._bar.update(number)
        now = time.monotonic()
        if not self._watched and now - self._told >= BEAT_S:
            self._told = now
            logger.info("%s", self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """How far it is after `seconds`: share, bytes, rows where they are counted, rate and time left."""
        rate = (self._done - self._skipped) / seconds
        rows = f", {self._rows} rows" if self._rows else ""
        left = f", {timedelta(seconds=round((self._total - self._done) / rate))} left" if rate else ""
        percent = 100 * self._done / self._total if self._total else 100
        return (
            f"{percent:.1f}%: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB{rows}, {rate / 1e6:.2f} MB/s{left}"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()


def setup() -> None:
    """Sends `logger` to stderr with a time; ranks above 0 keep to warnings."""
    rank = int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # some schedulers set RANK
    name = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank else logging.INFO)


def quiet_libraries() -> None:
    """Drops the warnings that torch, Megatron-Core and others give at every start and that no user can act on.

    PYTHONWARNINGS brings them back: what it says is left as it is.
    """
    if not os.environ.get("PYTHONWARNINGS"):
        warnings.filterwarnings("ignore", module=r"(torch|megatron|apex|transformer_engine|cutlass)(\.|$)")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="Please use DTensor instead")


def listed(numbers: list[int], most: int = 16) -> str:
    """`numbers` with commas, at most so many of them, and how many more there are."""
    shown = ", ".join(map(str, numbers[:most])) or "none"
    return f"{shown} and {len(numbers) - most} more" if len(numbers) > most else shown
