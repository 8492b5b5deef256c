"""What runs before a command: UTF-8 file names, the working directory, and one line for a missing package."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

KIT = Path(__file__).parents[1].absolute()
WORKING_DIR = "KIT_CWD"  # in the environment of a process that starts in the kit's folder
REMEDY = (
    "run bash common/shell/setup_venv.sh, which installs all packages for a CPU into .venv; on a GPU machine start the"
    " kit's image; or set PYTHON to a Python that has them (bash {platform}/doctor.sh lists what is missing)"
)


def fail(message: str) -> NoReturn:
    """Prints `message` to stderr and exits 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def report_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An `excepthook` that names a missing package and how to install it, and exits 2; else Python's own.

    A command imports its packages before it can handle an error.
    """
    name = getattr(error, "name", None) or ""
    package = name.split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "common", "tests"):
        sys.__excepthook__(kind, error, trace)
        return
    lacks = f"lacks {package}" if package not in sys.modules else f"has a {package} of another version, without {name}"
    fail(f"{sys.executable} {lacks}: {REMEDY.format(platform=os.environ.get('KIT_PLATFORM', 'cpu'))}")


def use_utf8() -> None:
    """Re-executes a `python -m common...` in Python's UTF-8 mode where the locale has another encoding.

    File names in what the kit writes are then the same bytes in every locale; stdout and stderr keep the locale's.
    """
    if sys.argv[0] == "-m" and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", None) or "utf-8")
        os.execv(sys.executable, sys.orig_argv)


def enter_working_dir() -> None:
    """Changes to the directory that `from_kit` or a script (common/shell/lib.sh) was in; exits 2 if it is gone."""
    folder = os.environ.pop(WORKING_DIR, "")
    if not folder:
        return
    try:
        os.chdir(folder)
    except OSError as error:
        fail(f"{folder} cannot be entered ({error.strerror}): start in another folder")


def pause_collection() -> None:
    """No garbage collection while a `python -m common...` is imported; `errors.run` turns it on again."""
    if sys.argv[0] == "-m":
        gc.disable()


@contextmanager
def importing() -> Iterator[None]:
    """No garbage collection in a block of imports, nor of their objects after it: torch's alone take it a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextmanager
def from_kit() -> Iterator[None]:
    """A `python -m common...` that is started in the block imports the kit's modules, not those of the current folder.

    `python -m` puts its current directory first on sys.path, and Python 3.10 does not know PYTHONSAFEPATH.
    """
    folder = os.environ[WORKING_DIR] = str(Path.cwd())
    os.chdir(KIT)
    try:
        yield
    finally:
        os.environ.pop(WORKING_DIR, None)
        os.chdir(folder)
