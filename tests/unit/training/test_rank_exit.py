"""A rank that fails exits at once, and leaves its traceback for the launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.training.launching.rank_exit import EXIT_REASONS

ROOT = Path(__file__).parents[3]
DENIED = "error: a: Permission denied: ask its owner for access (chmod, chown), or give another path"


@pytest.mark.parametrize(
    ("raised", "code", "last"),
    [
        ("KitError('TP=3')", 2, "error: TP=3"),
        ("KeyboardInterrupt()", 130, "interrupted"),
        ("ValueError('ours')", 1, "ValueError: ours"),
        ("OSError(13, 'Permission denied', 'a')", 2, DENIED),
        ("SystemExit(7)", 7, ""),
        ("SystemExit()", 0, ""),
    ],
)
def test_a_ranks_error_ends_it_before_any_teardown(raised: str, code: int, last: str) -> None:
    program = f"""
import atexit
from common.errors import KitError
from common.training.launching.rank_exit import exit_on_error
atexit.register(print, "taken down")
with exit_on_error():
    print("begun")
with exit_on_error():
    raise {raised}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.strip().split("\n")[-1]) == (code, "begun\n", last)


@pytest.mark.parametrize(
    ("raised", "left"),
    [("KitError('TP=3')", []), ("SystemExit(7)", []), ("ValueError('ours')", ["traceback_3"]),
     ("OSError(13, 'x', 'a')", ["traceback_3"])],
)  # fmt: skip
def test_errors_of_one_rank_alone_leave_a_traceback(tmp_path: Path, raised: str, left: list[str]) -> None:
    program = f"""
from common.errors import KitError
from common.training.launching.rank_exit import exit_on_error
with exit_on_error():
    raise {raised}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), EXIT_REASONS: str(tmp_path), "LOCAL_RANK": "3"}
    subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60, check=False)
    assert [path.name for path in tmp_path.iterdir()] == left
