"""The result of a verification: its log line, its error, and its JSON file."""

import dataclasses
import errno
import json
import platform
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.errors import KitError
from common.log import logger


@dataclass
class Report:
    """What was compared."""

    num_tensors: int = 0
    num_bytes: int = 0
    non_finite: int = 0
    made_zero: int = 0  # nonzero values that the cast made zero
    differing_replicas: int = 0  # norm weights of other TP ranks that differ from rank 0's
    dropped_rows: int = 0  # above vocab_size, with values
    errors: list[str] = field(default_factory=list)
    hugging_face: list[dict[str, Any]] = field(default_factory=list)  # every tensor, with its checksum
    megatron: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        """The report in one line."""
        result = "all bits agree" if not self.errors else f"{len(self.errors)} differences"
        counts = {
            "values are NaN or infinite": self.non_finite,
            "values became zero in the cast": self.made_zero,
            "norm weights of other TP ranks differ from rank 0's, which was used": self.differing_replicas,
            "rows above vocab_size were dropped": self.dropped_rows,
        }
        line = f"{self.num_tensors} tensors, {self.num_bytes / 1e9:.2f} GB: {result}"
        return line + "".join(f"; {count} {what}" for what, count in counts.items() if count)


def check_report(report: Report, path: Path | None) -> None:
    """Logs the result; raises KitError unless both sides are bitwise equal. path: of the JSON file, for the error."""
    if report.errors:
        message = "; ".join(report.errors[:5])
        message += f" and {len(report.errors) - 5} more" if len(report.errors) > 5 else ""
        message += f" (all in {path})" if path else ""
        raise KitError(f"verification failed: {message}: copy the source again, and report this")
    logger.info("verification: %s", report.line())
    if report.non_finite:
        logger.warning("%d values are NaN or infinite: they are written unchanged", report.non_finite)


def check_report_path(path: Path) -> None:
    """Raises OSError with the path unless a report can be written to `path`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
        pass


def write_report(path: Path, report: Report, settings: Any) -> None:
    """Writes the report as JSON: every tensor of both sides, totals, settings and versions."""
    content = {
        "settings": dataclasses.asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": version("safetensors"),
        },
        "totals": {"tensors": report.num_tensors, "bytes": report.num_bytes, "non_finite": report.non_finite},
        "result": report.line(),
        "errors": report.errors,
        "hugging_face": report.hugging_face,
        "megatron": report.megatron,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
