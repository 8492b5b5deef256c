"""Step 2 by its script, killed at random moments: the same command then gives what an uninterrupted run does."""

from pathlib import Path

from tests.soak.conversions import kill_all


def test_twelve_kills_of_the_script_leave_nothing_to_repair(tmp_path: Path) -> None:
    assert kill_all(tmp_path, 12, seed=7) == 12
