"""EXIT_DURATION_MIN: when a run is to be over, its last checkpoint written."""

import os
import time

STARTED = "KIT_STARTED"  # in a rank's environment: when the user's command began, in seconds since 1970
SAVE_MARGIN = 1.2  # of what the last save took


class Deadline:
    """So many minutes after the command began; never where they are None."""

    def __init__(self, minutes: float | None) -> None:
        started = float(os.environ.get(STARTED, time.time()))
        self._end = None if minutes is None else started + 60 * minutes
        self._asked_at: float | None = None
        self._longest = 0.0  # seconds between two questions: a step, and what comes after it

    def is_near(self, save_seconds: float) -> bool:
        """Whether another step and a save of `save_seconds` would end after it; to be asked once a step."""
        if self._end is None:
            return False
        now = time.time()
        if self._asked_at is not None:
            self._longest = max(self._longest, now - self._asked_at)
        self._asked_at = now
        return now + self._longest + SAVE_MARGIN * save_seconds >= self._end
