"""What the user can mend, told apart from what is our own mistake."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LAST_WORDS = "KIT_LAST_WORDS"  # in a rank's environment: the folder where the launcher finds what ended it


class KitError(Exception):
    """A mistake of the user: the message says the value, the rule and the way out."""


def run(main: Callable[[], None]) -> None:
    """Exits 0 after `main`; a KitError becomes one message on stderr and exit code 2, Ctrl-C 130."""
    try:
        main()
    except (KitError, KeyboardInterrupt) as error:
        sys.exit(tell(error))


def tell(error: BaseException) -> int:
    """Says `error` on stderr, what is our own mistake with its traceback; the exit code that goes with it."""
    if isinstance(error, KitError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    sys.excepthook(type(error), error, error.__traceback__)
    return 1


@contextmanager
def exit_at_once() -> Iterator[None]:
    """An error in the block is told as by `run`, and ends the process there and then.

    For a rank, nothing of which may be taken down: NCCL would wait for what it has begun with the other ranks, they
    for this one, and torchrun, which only sees processes end, for all of them (github.com/mlc-ai/Pith-Train/pull/31,
    github.com/sgl-project/SpecForge/pull/781).
    """
    try:
        yield
    except BaseException as error:
        code = error.code or 0 if isinstance(error, SystemExit) else tell(error)
        if code == 1:  # our own mistake: other ranks go on to complain of this one, and its traceback scrolls away
            leave_word("error", "".join(traceback.format_exception(error)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def leave_word(kind: str, text: str) -> None:
    """Leaves `text` for the launcher under `kind` and this process's local rank, if the disk takes it."""
    if LAST_WORDS in os.environ:
        with suppress(OSError):
            name = f"{kind}_{os.environ.get('LOCAL_RANK', '0')}"
            Path(os.environ[LAST_WORDS], name).write_text(text, encoding="utf-8")


def left_word(kind: str, local_rank: int) -> str:
    """What that process left; empty if nothing."""
    with suppress(OSError):
        return Path(os.environ[LAST_WORDS], f"{kind}_{local_rank}").read_text(encoding="utf-8")
    return ""
