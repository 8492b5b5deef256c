"""Finding: the result of one check, with its remedy."""

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
