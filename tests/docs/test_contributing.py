"""CONTRIBUTING.md names files, stages and areas that exist, and the limits that the tests hold."""

import re
from pathlib import Path

from tests.docs.test_run import AREAS, STAGES
from tests.unit.test_layers import MAX_FILE_LINES, MAX_FUNCTION_LINES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`((?:common|cpu|nvidia|metax|docker|tests|docs|requirements)/[\w/.-]*)`", TEXT)
    assert len(named) > 20 and [path for path in named if not (ROOT / path).exists()] == []


def test_names_in_a_file_are_there() -> None:
    pairs = re.findall(r"`(\w+)`(?:,? in| of| in) `(common/[\w/]+\.py|tests/[\w/]+\.sh)`", TEXT)
    assert len(pairs) > 4 and [pair for pair in pairs if pair[0] not in (ROOT / pair[1]).read_text()] == []


def test_every_stage_and_area_and_the_limits_are_named() -> None:
    checks = TEXT.split("## Checks\n")[1].split("\n## ")[0]
    assert [name for name in (*STAGES, *AREAS) if not re.search(rf"\b{name}\b", checks)] == []
    assert f"at most {MAX_FILE_LINES} lines; a function has at most {MAX_FUNCTION_LINES}" in TEXT
