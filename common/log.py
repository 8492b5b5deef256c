"""The kit's logger: rank 0 logs everything, other ranks only warnings, with their rank."""

import logging
import os
import sys
import warnings
from contextlib import nullcontext
from typing import Any, TextIO

from common.errors import is_terminal, line_start

logger = logging.getLogger("kit")
# Styles of a message on a terminal (ECMA-48, select graphic rendition).
PLAIN, BOLD, DIM, GREEN, YELLOW = (f"\x1b[{code}m" for code in (0, 1, 2, 32, 33))


class LineFormatter(logging.Formatter):
    """Lines with date and time, for a terminal if `stream` is one: with colors, unless NO_COLOR is set.

    A record's `style` is the color of its message.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.start = line_start(stream)
        self.colored = is_terminal(stream) and not os.environ.get("NO_COLOR")  # no-color.org
        text = f"{name}%(message)s"
        super().__init__(f"{DIM}%(asctime)s{PLAIN} {text}" if self.colored else f"%(asctime)s {text}", "%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        return self.start + super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without a traceback."""
        style = YELLOW if record.levelno >= logging.WARNING else getattr(record, "style", PLAIN)
        if self.colored and style != PLAIN:
            record.message = f"{style}{record.message}{PLAIN}"
        return super().formatMessage(record)


class LineHandler(logging.StreamHandler):
    """Writes lines above the progress bars of this process, which tqdm draws again below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record."""
        tqdm: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)  # where nothing has imported it there is no bar
        hidden = tqdm.external_write_mode(file=self.stream) if getattr(tqdm, "_instances", None) else nullcontext()
        with hidden:
            super().emit(record)


def setup() -> None:
    """Sends `logger` to stderr with date and time; ranks above 0 log warnings only."""
    rank = int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # some schedulers set RANK
    handler = LineHandler(sys.stderr)
    handler.setFormatter(LineFormatter(sys.stderr, f"[rank {rank}] " if rank else ""))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank else logging.INFO)


def quiet_libraries() -> None:
    """Filters warnings that torch, Megatron-Core and others raise at every start and that no user can act on.

    PYTHONWARNINGS, where it is set, decides instead.
    """
    if not os.environ.get("PYTHONWARNINGS"):
        warnings.filterwarnings("ignore", module=r"(torch|megatron|apex|transformer_engine|cutlass)(\.|$)")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="Please use DTensor instead")


def listed(numbers: list[int], limit: int = 16) -> str:
    """`1, 2, 3`; `none` for an empty list; `1, 2 and 40 more` above `limit` numbers."""
    shown = ", ".join(map(str, numbers[:limit])) or "none"
    return f"{shown} and {len(numbers) - limit} more" if len(numbers) > limit else shown
