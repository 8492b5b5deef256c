"""A progress bar for long work on files: conversion and preprocessing."""

import sys
import time
from datetime import timedelta
from types import TracebackType

from common.log import logger

LOG_INTERVAL_S = 60.0


class Progress:
    """The progress of `total_bytes` of work: a bar on a terminal, else one log line a minute. A context manager."""

    def __init__(self, total_bytes: int) -> None:
        from tqdm import tqdm  # not above: logging alone needs no package

        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, leave=False, disable=not is_terminal)
        self._total, self._is_terminal = total_bytes, is_terminal
        self._done = self._skipped = self._rows = 0
        self._started = self._logged_at = time.monotonic()

    def skip(self, number: int) -> None:
        """Counts `number` bytes that need no work; they do not count towards the rate."""
        self._skipped += number
        self.update(number)

    def advance(self, number: int, rows: int) -> None:
        """Counts `number` more bytes as done, with `rows` rows in them."""
        self._rows += rows
        self.update(number)

    def update(self, number: int) -> None:
        """Counts `number` more bytes as done."""
        self._done += number
        self._bar.update(number)
        now = time.monotonic()
        if not self._is_terminal and now - self._logged_at >= LOG_INTERVAL_S:
            self._logged_at = now
            logger.info("%s", self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """The log line after `seconds`: percentage, bytes, rows if they are counted, rate and time left."""
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
