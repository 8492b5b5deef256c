"""What the user can mend, told apart from what is our own mistake."""

import errno
import io
import os
import select
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REMEDIES = {
    (errno.EACCES, errno.EPERM): "this user may not: have its owner allow it (chmod, chown), or give another path",
    (errno.EROFS,): "it is mounted to be read only: give a path elsewhere, or mount it to be written",
    (errno.ENOENT,): "give a path that is there",
    (errno.ELOOP,): "a symbolic link leads back to itself: mend it, or give another path",
    (errno.ENOSPC, errno.EDQUOT): "make room (df, quota), and run the same command again",
    (errno.EFBIG,): "this file system, or `ulimit -f`, takes no larger file: give a path elsewhere",
    (errno.EMFILE, errno.ENFILE): "let more files be open at once: ulimit -n 65536",
    (errno.ENOMEM, errno.EAGAIN): "memory or processes are used up (free, ulimit -u): free some, and run it again",
    (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO): "the disk or the network file system fails (dmesg):"
    " run the same command again once it is mended",
}

LAST_WORDS = "KIT_LAST_WORDS"  # in a rank's environment: the folder where the launcher finds what ended it


class KitError(Exception):
    """A mistake of the user: the message says the value, the rule and the way out."""


# Categories of characters that are not seen but act on a terminal: controls, directions, line ends of other kinds.
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
SHOWN = "\t\n\u200c\u200d"  # of these: what lays text out, and what joins letters and emoji


def run(main: Callable[[], None]) -> None:
    """Exits 0 after `main`; what the user can mend becomes one message on stderr and exit code 2, Ctrl-C 130."""
    escape_what_cannot_be_shown()
    try:
        main()
        sys.stdout.flush()
    except (KitError, KeyboardInterrupt) as error:
        sys.exit(tell(error))
    except (OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and no_one_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            sys.exit(128 + signal.SIGPIPE)
        if (told := told_of(error)) is None:
            raise
        sys.exit(tell(KitError(told)))


def no_one_reads() -> bool:
    """Whether stdout is a pipe whose reader has enough, as `head`."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def escape_what_cannot_be_shown() -> None:
    """Lets a character that the terminal's encoding lacks, or a byte of a name that is no text, be shown as \\x..."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def told_of(error: BaseException | None) -> str | None:
    """The path, what the system says and the remedy; None for what is no OSError with a path or a known remedy."""
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        error = error.__context__  # pathlib before 3.13 puts it so
    if not isinstance(error, OSError):
        return None
    remedy = next((remedy for numbers, remedy in REMEDIES.items() if error.errno in numbers), None)
    paths = " -> ".join(
        os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, str | bytes)
    )
    if error.errno is None or not (paths or remedy):
        return None
    where = f"{paths}: " if paths else ""
    return f"{where}{os.strerror(error.errno)}: {remedy or 'mend the path, or give another one'}"


def visible(text: str) -> str:
    """`text` with each character that would act on a terminal escaped, as \\x1b; a backslash of its own stays one."""
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in SHOWN or unicodedata.category(character) not in UNSEEN:
        return character
    return character.encode("unicode_escape").decode("ascii")


def tell(error: BaseException) -> int:
    """Says `error` on stderr, what is our own mistake with its traceback; the exit code that goes with it."""
    if isinstance(error, KitError):
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    traceback.print_exception(error)
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
            Path(os.environ[LAST_WORDS], name).write_text(text, encoding="utf-8", errors="backslashreplace")


def left_word(kind: str, local_rank: int) -> str:
    """What that process left; empty if nothing."""
    with suppress(OSError):
        return Path(os.environ[LAST_WORDS], f"{kind}_{local_rank}").read_text(encoding="utf-8")
    return ""
