"""The table of flags, flags.txt: what each flag and variable of an old script becomes here."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).with_name("flags.txt")
CHANGED = "changed:"
NOTHING = "-"
MISSING = "missing"


@dataclass(frozen=True)
class Row:
    """One line of the table; `setting` is empty where none corresponds, `argument` is the word after the rule."""

    name: str
    default: str
    setting: str
    rule: str
    argument: str
    note: str

    @property
    def is_changed(self) -> bool:
        """Whether the flag's meaning differs here."""
        return self.note.startswith(CHANGED)

    def text(self, value: str) -> str:
        """The note for a flag of this value."""
        return self.note.removeprefix(CHANGED).strip().replace("{value}", value)


@lru_cache
def read_table() -> Mapping[str, Mapping[str, Row]]:
    """The rows of each section (launcher, train, preprocess, convert, environment), by name, in the table's order."""
    sections: dict[str, dict[str, Row]] = {}
    rows: dict[str, Row] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            rows = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, default, setting, rule, note = (cell.strip() for cell in line.split("|"))
            kind, _, argument = rule.partition(" ")
            assert name not in rows, f"{FILE}: {name} twice"
            rows[name] = Row(name, default, "" if setting == NOTHING else setting, kind, argument.strip(), note)
    return sections
