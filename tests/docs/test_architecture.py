"""docs/architecture.md: every part and every room is in it, and what it says about imports is true."""

import re
from pathlib import Path

import pytest

from tests.unit.test_layers import LAYERS, MODULES, ROOMS, own_imports

TEXT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMES = [f"{part}.{room}" for part, rooms in ROOMS.items() for room in rooms]


def table(title: str) -> dict[str, str]:
    """Each name in the first column of a section's table, with the last column."""
    lines = re.findall(r"^\| (`.*) \|$", TEXT.split(f"## {title}\n")[1].split("\n## ")[0], re.M)
    cells = [line.split(" | ") for line in lines]
    return {name: last for first, *_, last in cells for name in re.findall(r"`([\w.]+)`", first)}


def test_every_part_has_a_row_lowest_first() -> None:
    layer = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    named = list(table("Parts"))
    assert set(named) == set(layer) and len(named) == len(layer)
    assert named == sorted(named, key=layer.__getitem__)


def test_every_room_has_a_row_in_the_order_of_imports_and_is_in_the_drawing() -> None:
    assert list(table("Rooms")) == NAMES
    drawing = TEXT.split("```")[1]
    assert [name for name in NAMES if name not in drawing] == []


@pytest.mark.parametrize("room", NAMES)
def test_a_room_imports_nothing_that_it_must_not_know(room: str) -> None:
    unknown = re.findall(r"`([\w.]+)`", table("Rooms")[room])
    files = [name for name in MODULES if f"{name}.".startswith(f"common.{room}.")]
    imported = {other for name in files for other in own_imports(name)}
    assert unknown and files
    assert not {other for other in imported for name in unknown if f"{other}.".startswith(f"common.{name}.")}
