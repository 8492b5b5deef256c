"""What a proof says: in the log, and in a file."""

import dataclasses
import errno
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.checkpoint.verification.verify import Report
from common.errors import KitError
from common.log import logger


def check_report(report: Report, path: Path | None) -> None:
    """Tells what was compared; raises KitError unless both sides hold the same bits."""
    if report.errors:
        told = "; ".join(report.errors[:5])
        told += f" and {len(report.errors) - 5} more" if len(report.errors) > 5 else ""
        told += f" (all in {path})" if path else ""
        raise KitError(f"the proof failed: {told}: copy the source again, and report this")
    logger.info("proof: %s", report.line())
    if report.non_finite:
        logger.warning("%d values are NaN or infinite: they are written as they are", report.non_finite)


def check_report_place(path: Path) -> None:
    """Raises OSError with the path unless a report can be written to `path`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
        pass


def write_report(path: Path, report: Report, settings: Any) -> None:
    """Writes what was compared as JSON: every tensor of both sides, totals, settings and versions."""
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
