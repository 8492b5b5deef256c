"""Step 2 by its script, ended by SIGKILL at random moments: the same command gives what an unbroken run does."""

from pathlib import Path

from tests.soak.conversions import kill_all


def test_twelve_kills_of_the_script_leave_nothing_to_mend(tmp_path: Path) -> None:
    assert kill_all(tmp_path, 12, seed=7) == 12
