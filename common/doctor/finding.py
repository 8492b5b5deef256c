"""Finding: the result of one check, with its remedy."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The result of one check; `remedy` is printed unless `status` is ok."""

    subject: str
    status: str  # ok, warn (a run starts, but may be slow or fail later) or fail (it cannot start)
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<5} {self.subject:<20} {self.found}"
        return line if self.status == "ok" else f"{line}\n{'':<26} -> {self.remedy}"


def judge(subject: str, found: str, wrong: bool, remedy: str, status: str = "fail") -> Finding:
    """A Finding of `status` with its remedy if `wrong`, else ok."""
    return Finding(subject, status, found, remedy) if wrong else Finding(subject, "ok", found)


def verdict(findings: Sequence[Finding]) -> str:
    """`ready`, or the one thing to do next: the first failure's remedy, else the first warning's."""
    failures, warnings = ([each for each in findings if each.status == status] for status in ("fail", "warn"))
    if failures:
        return f"not ready: {len(failures)} to fix, first {failures[0].subject}: {failures[0].remedy}"
    if warnings:
        return f"ready, with {len(warnings)} warnings, first {warnings[0].subject}: {warnings[0].remedy}"
    return "ready"
