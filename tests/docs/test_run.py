"""tests/run.sh: its areas name what exists, every unit test belongs to one, and other names are refused."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "tests" / "run.sh").read_text(encoding="utf-8")
AREAS = {name: paths.split() for name, paths in re.findall(r"^  \[(\w+)\]='([^']*)'$", SCRIPT, re.M)}
STAGES = re.findall(r"\w+", " ".join(re.findall(r"^(?:STAGES|BESIDE)=\((.*)\)$", SCRIPT, re.M)))


def test_an_area_names_existing_files() -> None:
    assert len(AREAS) > 7 and all(AREAS.values())
    assert [path for paths in AREAS.values() for path in paths if not (ROOT / path).exists()] == []


def test_every_unit_test_belongs_to_one_area() -> None:
    units = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests" / "unit").iterdir()
        if path.name.startswith("test_") or any(path.glob("test_*.py"))
    }
    named = [path for paths in AREAS.values() for path in paths if path.startswith("tests/unit/")]
    assert sorted(named) == sorted(units - {"tests/unit/test_layers.py"})  # runs in every area
    assert "tests/unit/test_layers.py" in SCRIPT


def test_every_folder_of_tests_that_runs_by_itself_is_a_stage() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert folders - {"gpu"} | {"lint", "shell"} == set(STAGES)


def test_the_head_names_every_stage_and_area() -> None:
    head = SCRIPT.split("\nset -uo")[0]
    assert [name for name in (*AREAS, *STAGES) if not re.search(rf"\b{name}\b", head)] == []


def test_an_unknown_name_is_refused_before_anything_runs() -> None:
    done = subprocess.run(["bash", ROOT / "tests" / "run.sh", "lint", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "no stage or area 'nothing'" in done.stderr
    assert all(name in done.stderr for name in (*AREAS, *STAGES))
