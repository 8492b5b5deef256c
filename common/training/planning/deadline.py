"""EXIT_DURATION_MIN: the time by which a run must have saved its last checkpoint."""

import os
import time

STARTED = "KIT_STARTED"  # in a rank's environment: when the user's command started, in seconds since 1970
SAVE_MARGIN = 1.2  # times the duration of the last save


class Deadline:
    """A deadline `minutes` after the command started; None: no deadline."""

    def __init__(self, minutes: float | None) -> None:
        started = float(os.environ.get(STARTED, time.time()))
        self._end = None if minutes is None else started + 60 * minutes
        self._last_check: float | None = None
        self._longest = 0.0  # seconds between two checks: a step, with its logging, evaluation and save

    def is_near(self, save_seconds: float) -> bool:
        """Whether another step and a save of `save_seconds` would pass the deadline; call it once a step."""
        if self._end is None:
            return False
        now = time.time()
        if self._last_check is not None:
            self._longest = max(self._longest, now - self._last_check)
        self._last_check = now
        return now + self._longest + SAVE_MARGIN * save_seconds >= self._end
