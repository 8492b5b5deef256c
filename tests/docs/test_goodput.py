"""The tables of docs/reliability.md are those that its script prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_of_trained_time_are_what_the_script_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.goodput"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n| 16,384 | 72B |") == 2
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert done.stdout.strip() in page, "print them again: python -m tests.bench.goodput"


def test_what_the_page_says_of_slow_saves_is_what_the_script_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.goodput", "--disk-gb-s=1"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = next(line for line in done.stdout.splitlines() if line.startswith("| 64 | 7B |"))
    best, now = (cell.strip(" *") for cell in row.split("|")[-3:-1])
    page = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    assert f"64 GPUs train 7B {best} of the time at best, and {now} with `SAVE_INTERVAL=100`" in page
