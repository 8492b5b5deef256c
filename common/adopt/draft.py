"""What becomes of an old command: settings, and remarks on all that is none."""

import dataclasses
import re
from dataclasses import dataclass, field

from common.adopt.command_line import Flag, Step
from common.adopt.variables import MARK, Variables
from common.model.shape.config import QwenConfig
from common.training.settings import TrainSettings

PROBLEM, CHANGED, HERE = "problem", "changed", "not needed"
FIELDS = {each.name.upper(): each for each in dataclasses.fields(TrainSettings)}


@dataclass(frozen=True)
class Remark:
    """A line on something of the script. kind: PROBLEM, CHANGED in meaning, or HERE: not needed."""

    kind: str
    text: str


@dataclass
class Draft:
    """The settings so far, each with its value and where it comes from, and the remarks.

    vendor: the folder of the scripts; defaults: those of the step's script there; qwen: the shape to compare with.
    """

    step: Step
    variables: Variables
    vendor: str
    defaults: dict[str, str]
    qwen: QwenConfig | None = None
    settings: dict[str, tuple[str, str]] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def set(self, name: str, value: str, flag: Flag) -> None:
        """Sets a setting, or notes a problem where the script here would refuse the value."""
        choices = FIELDS[name].metadata.get("choices") if self.step.kind == "train" and name in FIELDS else ()
        if choices and value not in choices:
            self.note(PROBLEM, flag, f"{name} is one of {', '.join(choices)} here: left at {self.defaults.get(name)}")
        elif re.search(r'[$`\n]|".*\'|\'.*"', value):
            self.note(PROBLEM, flag, f"a file of settings expands nothing and has no such quotes: set {name} yourself")
        elif flag.line or self.defaults.get(name) != value:
            why = f"{flag.name}" if flag.line else f"{flag.name}'s default in the old program"
            self.settings[name] = (value, why)

    def get(self, name: str) -> str:
        """The value that the step will have."""
        return self.settings[name][0] if name in self.settings else self.defaults.get(name, "")

    def number(self, name: str) -> int | None:
        """The value as an integer; None if it is empty."""
        value = self.get(name)
        return int(value) if value.isdecimal() else None

    def is_known(self, flag: Flag) -> bool:
        """Whether the flag's value is known; notes a problem otherwise."""
        if not MARK.search(flag.value):
            return True
        self.note(
            PROBLEM, flag, "its value is known only when the script runs: set it yourself, or give --args or --set"
        )
        return False

    def note(self, kind: str, flag: Flag, text: str) -> None:
        """Adds a remark on a flag, with its line and value."""
        shown = self.variables.shown(f"{flag.name} {flag.value}".strip())
        where = f"{shown}" if flag.line else f"{shown} (the old program's default)"
        self.say(kind, f"{where}: {text}")

    def say(self, kind: str, text: str) -> None:
        """Adds a remark unless it is there."""
        remark = Remark(kind, text)
        if remark not in self.remarks:
            self.remarks.append(remark)
