"""How a rank exits, and what it leaves for the launcher to log: torchrun itself only sees exit codes."""

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from common.errors import KitError, report
from common.log import logger

EXIT_REASONS = "KIT_EXIT_REASONS"  # in a rank's environment: the folder of files that the launcher reads
TRACEBACK, STOPPED_AT = "traceback", "stopped_at"  # kinds of exit reasons; the second is of a run that was stopped


@contextmanager
def exit_reasons() -> Iterator[None]:
    """A folder for the exit reasons of ranks that are started in the block."""
    with tempfile.TemporaryDirectory(prefix="kit-") as folder:
        os.environ[EXIT_REASONS] = folder
        yield


def write_exit_reason(kind: str, text: str) -> None:
    """Writes `text` for the launcher, under `kind` and this process's local rank; a disk error is ignored."""
    if EXIT_REASONS in os.environ:
        with suppress(OSError):
            name = f"{kind}_{os.environ.get('LOCAL_RANK', '0')}"
            Path(os.environ[EXIT_REASONS], name).write_text(text, encoding="utf-8", errors="backslashreplace")


def read_exit_reason(kind: str, local_rank: int) -> str:
    """What that rank wrote under `kind`; empty if nothing."""
    with suppress(OSError):
        return Path(os.environ[EXIT_REASONS], f"{kind}_{local_rank}").read_text(encoding="utf-8")
    return ""


def log_failure(messages: list[str]) -> None:
    """Logs what is to be said of a rank that failed."""
    for message in messages:
        logger.error("%s", message)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Reports an exception in the block as `errors.run` does, and ends the process without any teardown.

    In a rank teardown would hang: NCCL waits for the collectives it has started with the other ranks, they wait for
    this one, and torchrun, which only sees processes end, waits for all of them
    (github.com/mlc-ai/Pith-Train/pull/31, github.com/sgl-project/SpecForge/pull/781).
    """
    try:
        yield
    except BaseException as error:
        code = error.code or 0 if isinstance(error, SystemExit) else report(error)
        if not isinstance(error, SystemExit | KeyboardInterrupt | KitError):
            # The other ranks go on to complain about this one, and what it printed scrolls away.
            write_exit_reason(TRACEBACK, "".join(traceback.format_exception(error)))
        exit_now(code if isinstance(code, int) else 1)


def exit_now(code: int) -> NoReturn:
    """Ends the process with `code` after flushing its output, without any teardown.

    Also for a rank that is done, and whose group is destroyed: on a busy machine a thread of PyTorch's that outlived it
    was seen to end the process in std::terminate (exit code -6), and one failed rank fails the run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
