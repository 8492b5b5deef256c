"""A command of the script as a step of this kit, with its flags and the launcher's."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from common.adopt.shell import Command, Script
from common.adopt.variables import MARK

# What a program's name begins or ends with, and the step that it is; the first that matches.
PROGRAMS = (
    (r"build_idxmap_sft|sft_data|preprocess.*sft", "preprocess_sft"),
    (r"preprocess_data|preprocess_mmdata|make_pretraining", "preprocess_pretrain"),
    (r"hf2m|2hf|convert|impl\.py|checkpoint/util", "convert"),
    (r"pretrain|train|finetune|sft|run_gpt", "train"),
)
SILENT = ("echo", "printf", "cat", "export", "alias", "nohup.out")
SHELLS = ("sh", "bash", "zsh")
NUMBER = re.compile(r"-[0-9.][0-9.e+-]*")


@dataclass(frozen=True)
class Flag:
    """A flag with its words; line 0: it is not in the script, and has the old program's default."""

    name: str
    words: tuple[str, ...]
    line: int

    @property
    def value(self) -> str:
        """The words in one text."""
        return " ".join(self.words)


@dataclass
class Step:
    """A command that is a step: its kind, its program, its flags by name, the launcher's flags.

    repeated: flags that are given again, which the last one overrides; stray: words that belong to no flag.
    """

    kind: str
    program: str
    command: Command
    flags: dict[str, Flag] = field(default_factory=dict)
    launcher: dict[str, Flag] = field(default_factory=dict)
    repeated: list[Flag] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)


def find_steps(script: Script) -> tuple[list[Step], list[Command]]:
    """(the commands that are steps, the others), in the script's order."""
    steps, others = [], []
    for command in script.commands:
        step = _step(command)
        if step:
            steps.append(step)
        else:
            others.append(command)
    return steps, others


def started_script(command: Command) -> str | None:
    """`bash other.sh ...` of a command that starts another script, else None."""
    program = PurePosixPath(command.words[0]).name
    if program in ("source", "."):
        return shlex.join(command.words)
    script = next((word for word in command.words if word.endswith(".sh")), None)
    return shlex.join(command.words) if script and program in (*SHELLS, PurePosixPath(script).name, "srun") else None


def _step(command: Command) -> Step | None:
    words = list(command.words)
    if words[0] in SILENT:
        return None
    for number, word in enumerate(words):
        # As in `srun bash -c "torchrun ... pretrain.py ..."`.
        if " " in word and re.search(r"\.py\b", word) and number and words[number - 1] == "-c":
            return _step(
                Command(tuple(shlex.split(word.replace("'", " ").replace('"', " "))), command.line, command.read)
            )
    at = next((number for number, word in enumerate(words) if number and re.search(r"\.py$", word)), None)
    if at is None:
        return None
    kind = next((step for pattern, step in PROGRAMS if re.search(pattern, words[at])), None)
    if kind is None:
        return None
    step = Step(kind, words[at], command)
    step.flags = _flags(words[at + 1 :], step, command.line)
    step.launcher = _flags(words[1:at], step, command.line, launcher=True)
    return step


def _flags(words: Sequence[str], step: Step, line: int, launcher: bool = False) -> dict[str, Flag]:
    found: dict[str, Flag] = {}
    for name, values in _grouped(words):
        if not name:
            step.stray += [] if launcher else values
            continue
        while len(values) > 1 and not name.endswith("data-path") and MARK.fullmatch(values[-1]):
            step.stray.append(values.pop())  # such as $MORE_ARGS, which may hold any flags
        if name in found and not launcher:
            step.repeated.append(found.pop(name))
        found[name] = Flag(name, tuple(values), line)
    return found


def _grouped(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(the flag with dashes for underscores, its words); an empty flag has the words before the first."""
    name, values = "", []  # type: str, list[str]
    for word in words:
        if not word.startswith("-") or NUMBER.fullmatch(word) or word == "-":
            values.append(word)
            continue
        if name or values:
            yield name, values
        text, _, value = word.partition("=")
        name, values = text.replace("_", "-"), [value] if "=" in word else []
    if name or values:
        yield name, values
