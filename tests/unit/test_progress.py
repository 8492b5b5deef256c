import logging
import re

import pytest

from common import progress


def test_without_a_terminal_progress_is_a_line_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "kit")
    now = [0.0]
    monkeypatch.setattr("common.progress.time.monotonic", lambda: now[0])
    with progress.Progress(400_000_000) as bar:
        bar.skip(100_000_000)
        for _ in range(4):
            now[0] += 25
            bar.advance(25_000_000, 10)
    assert caplog.messages == ["43.8%: 175.0 of 400.0 MB, 30 rows, 1.00 MB/s, 0:03:45 left"]


def test_progress_of_nothing_is_complete() -> None:
    assert re.match(r"100.0%: 0.0 of 0.0 MB, 0.00 MB/s$", progress.Progress(0).line(1.0))
