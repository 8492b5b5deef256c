"""KitError for what the user can fix, one handler for every command's errors, and one text for what the system refuses.

A command calls `run(main)`. Code that reads or writes files adds the path by `reading` or `writing`, since read(2),
write(2) and fsync(2) report none, and handles an OSError itself only where it goes on without the file.
"""

import errno
import gc
import io
import os
import select
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

# Exit codes. 1 is a bug, with a traceback; 128 + n is an end by signal n.
USER_ERROR = 2
STOPPED = 75  # stopped before the end and saved, the same command resumes (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130

ERASE = "\r\x1b[K"  # the line that the cursor is in

AGAIN = "then run the same command again"
REMEDIES = {
    (errno.EACCES, errno.EPERM): "ask its owner for access (chmod, chown), or give another path",
    (errno.EROFS,): "remount it read-write, or give a path on another file system",
    (errno.ENOENT,): "check the path, and that its file system is mounted",
    (errno.ENAMETOOLONG,): "give a shorter path: most file systems allow 255 bytes per name",
    (errno.ELOOP,): "a symbolic link points back to itself: fix it, or give another path",
    (errno.ENOSPC,): f"free some space (df -h, df -i), {AGAIN}",
    (errno.EDQUOT,): f"your quota is used up: free some space (quota -s), {AGAIN}",
    (errno.EFBIG,): "the file system or `ulimit -f` limits the size of a file: raise it, or give a path elsewhere",
    (errno.EMFILE, errno.ENFILE): "raise the limit on open files: ulimit -n 65536",
    (errno.ENOMEM, errno.EAGAIN): f"out of memory or processes (free -h, ulimit -u): free some, {AGAIN}",
    (errno.ESTALE, errno.ENOTCONN): f"the network file system lost it: check the mount, {AGAIN}",
    (errno.EIO, errno.EREMOTEIO): f"the disk or the network file system failed: see dmesg, {AGAIN}",
}
OTHER_REMEDY = "check the path, or give another one"
# From torch, CUDA, NCCL, cuBLAS and the CPU allocator, each in a RuntimeError.
OUT_OF_MEMORY_TEXTS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


class KitError(Exception):
    """An error that the user can fix: the message has the value, the rule and the remedy."""


# Unicode categories of characters that are invisible but act on a terminal: controls, direction marks, line separators.
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
PRINTED = "\t\n\u200c\u200d"  # of these, printed as they are: layout, and joiners of letters and emoji


def run(main: Callable[[], None]) -> None:
    """Exits 0 after `main`; prints one line and exits 2 for what the user can fix, 130 for Ctrl-C.

    Any other exception passes through.
    """
    escape_unencodable()
    gc.enable()  # common/__init__.py has turned it off
    gc.freeze()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not stdout_reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        sys.exit(128 + signal.SIGPIPE)
    except (KitError, KeyboardInterrupt, OSError, RuntimeError) as error:
        if (line := one_line(error)) is None:
            raise
        print(line_start(sys.stderr) + line, file=sys.stderr)
        sys.exit(exit_code(error))


def line_start(stream: TextIO) -> str:
    """What begins a line on `stream`: on a terminal it erases a progress bar, which another process may have left."""
    return ERASE if is_terminal(stream) else ""


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that knows ANSI's control sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def one_line(error: BaseException) -> str | None:
    """The line on stderr for what the user can fix; None for a bug, which needs a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error) if isinstance(error, KitError) else describe_os_error(error)
    return None if text is None else f"error: {visible(text)}"


def exit_code(error: BaseException) -> int:
    """USER_ERROR, INTERRUPTED, or 1 for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 1 if one_line(error) is None else USER_ERROR


def report(error: BaseException) -> int:
    """Prints `error` to stderr, a bug with its traceback; returns the exit code."""
    print(line_start(sys.stderr), end="", file=sys.stderr)
    if (line := one_line(error)) is None:
        traceback.print_exception(error)
    else:
        print(line, file=sys.stderr)
    return exit_code(error)


def describe_os_error(error: BaseException | None) -> str | None:
    """Paths, the system's message and a remedy; None unless `error` is an OSError with a path or a known errno."""
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        error = error.__context__  # pathlib before Python 3.13 wraps it
    if not isinstance(error, OSError) or error.errno is None:
        return None
    paths = " -> ".join(
        os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, str | bytes)
    )
    remedy = next((remedy for numbers, remedy in REMEDIES.items() if error.errno in numbers), None)
    if not (paths or remedy):
        return None
    return f"{paths + ': ' if paths else ''}{_message(error)}: {remedy or OTHER_REMEDY}"


def _message(error: OSError) -> str:
    """`No space left on device`, and what an error of our own adds to it."""
    text = os.strerror(error.errno or 0)
    return text if error.strerror in (None, "", text) else f"{text} ({error.strerror})"


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Raises KitError `NAME cannot be read: ...` for an OSError in the block."""
    with _naming(f"{name} cannot be read", str(name)):
        yield


@contextmanager
def writing(name: object) -> Iterator[None]:
    """Raises KitError `NAME cannot be written: ...` for an OSError in the block."""
    with _naming(f"{name} cannot be written", str(name)):
        yield


@contextmanager
def _naming(failure: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        known = describe_os_error(error) or f"{error}: {OTHER_REMEDY}"
        raise KitError(f"{failure}: {known.removeprefix(f'{name}: ')}") from error


def out_of_memory(error: BaseException) -> str | None:
    """The first line of an out-of-memory error, of the host or a device; None for any other error."""
    if isinstance(error, MemoryError):
        return str(error) or "of the host"
    if not isinstance(error, RuntimeError) or not any(text in str(error) for text in OUT_OF_MEMORY_TEXTS):
        return None
    # torch's message continues with a link to its documentation, or with lines of C++.
    return str(error).split("  See documentation")[0].strip().splitlines()[0].rstrip(".")


def stdout_reader_is_gone() -> bool:
    """Whether stdout is a pipe that its reader has closed, such as `head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def escape_unencodable() -> None:
    r"""Prints a character that the terminal's encoding lacks, or an undecodable byte of a file name, as \x..."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def visible(text: str) -> str:
    r"""`text` with each character that would act on a terminal escaped, such as \x1b; backslashes stay single."""
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character in PRINTED or unicodedata.category(character) not in INVISIBLE:
        return character
    return character.encode("unicode_escape").decode("ascii")
