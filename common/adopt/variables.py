"""The variables of a script that is read: what they hold, where from, and a mark in a text for what cannot be known."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# A mark stands for a text that only a run of the script would know: OPEN, its number in `unknown`, CLOSE.
OPEN, CLOSE = "\ue000", "\ue001"
MARK = re.compile(f"{OPEN}([0-9]+){CLOSE}")


@dataclass(frozen=True)
class Assignment:
    """`name`=`value` of one line; `value` may have marks."""

    name: str
    value: str
    line: int
    exported: bool


@dataclass
class Variables:
    """What the script's variables hold at this point of it.

    assigned: names that any line assigns, read or not; without a value they are empty, as in bash.
    arguments: $1, $2, ..., None where they were not given.
    read: the names that the current expansion has read; sources: the names that each variable was made of.
    unset: the names taken as unset, since no line sets them; doubtful: those that a part may set which is not read.
    defaulted: the names that ${name:=word} has set; fixed: those that `--set` gives, whatever a line assigns.
    arithmetic: how a variable was calculated.
    """

    assigned: frozenset[str] = frozenset()
    arguments: Sequence[str] | None = None
    values: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    sources: dict[str, set[str]] = field(default_factory=dict)
    arithmetic: dict[str, str] = field(default_factory=dict)
    unset: set[str] = field(default_factory=set)
    defaulted: list[str] = field(default_factory=list)
    fixed: frozenset[str] = frozenset()
    doubtful: set[str] = field(default_factory=set)

    def mark(self, source: str) -> str:
        """A mark for `source`, a piece of the script."""
        self.unknown.append(" ".join(source.split()))
        return f"{OPEN}{len(self.unknown) - 1}{CLOSE}"

    def shown(self, text: str) -> str:
        """`text` with the pieces of the script in place of marks."""
        return MARK.sub(lambda found: self.shown(self.unknown[int(found[1])]), text)

    def known(self, name: str) -> bool:
        """Whether the value of `name` follows from the script and what was given with it."""
        if name.isdecimal() or name in ("@", "*", "#"):
            return self.arguments is not None and name != "0"
        return name not in self.doubtful and (name in self.values or name in self.assigned)

    def get(self, name: str, source: str) -> list[str]:
        """The words that `name` holds, one unless it is an array or $@; a mark for `source` if it is not known."""
        self.read.add(name)
        if not self.known(name):
            return [self.mark(source)]
        if name in ("@", "*"):
            return list(self.arguments or ())
        if name == "#":
            return [str(len(self.arguments or ()))]
        if name.isdecimal():
            given = self.arguments or ()
            return [given[int(name) - 1]] if int(name) <= len(given) else [""]
        return self.values.get(name, [""])

    def assign(self, name: str, words: list[str], made_of: Iterable[str], *, append: bool = False) -> None:
        """Sets `name`, or with `append` adds to the array that it holds; a `fixed` name keeps its value."""
        if name in self.fixed:
            return
        if not append:
            self.doubtful.discard(name)
        self.values[name] = [*self.values.get(name, []), *words] if append else words
        self.sources[name] = (self.sources.get(name, set()) if append else set()) | set(made_of)

    def origins(self, names: Iterable[str]) -> set[str]:
        """`names` and all that they were made of."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.sources.get(name, ())
        return found


def from_outside(given: Mapping[str, str], assigned: Iterable[str], arguments: Sequence[str] | None) -> Variables:
    """The variables at the first line: `given`, as by `--set`, and the script's arguments."""
    return Variables(
        frozenset(assigned), arguments, {name: [value] for name, value in given.items()}, fixed=frozenset(given)
    )
