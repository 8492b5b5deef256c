"""What comes before a command: names of files are UTF-8, its folder is entered, a missing package is told in a line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

KIT = Path(__file__).parents[1].absolute()
FOLDER = "KIT_CWD"  # in the environment of a process that starts in the kit's folder: where it is to work
CURE = (
    "bash common/shell/setup_venv.sh makes .venv with all packages for a CPU, beside a GPU start the kit's image; or"
    " set PYTHON to a Python that has them (bash {platform}/doctor.sh lists what is missing)"
)


def refuse(told: str) -> None:
    """Says `told` on stderr and exits 2."""
    print(f"error: {told}", file=sys.stderr)
    raise SystemExit(2)


def tell_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's `excepthook`, but of a package that is missing it says which, and where all come from, and exits 2.

    The commands import their packages before they can handle an error.
    """
    package = (getattr(error, "name", None) or "").split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "common", "tests"):
        sys.__excepthook__(kind, error, trace)
        return
    refuse(f"{sys.executable} lacks {package}: {CURE.format(platform=os.environ.get('KIT_PLATFORM', 'cpu'))}")


def use_utf8() -> None:
    """Starts a `python -m common...` again in Python's UTF-8 mode where the locale has another encoding.

    Names of files in what is written are then the same bytes in every locale; what is printed stays in the locale's.
    """
    if sys.argv[0] == "-m" and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", None) or "utf-8")
        os.execv(sys.executable, sys.orig_argv)


def enter_folder() -> None:
    """Goes where `from_kit` or a script (common/shell/lib.sh) was; exits 2 where that folder is gone."""
    folder = os.environ.pop(FOLDER, "")
    if not folder:
        return
    try:
        os.chdir(folder)
    except OSError as error:
        refuse(f"{folder} cannot be entered ({error.strerror}): start in another folder")


@contextmanager
def from_kit() -> Iterator[None]:
    """A `python -m common...` that is started in the block runs the kit's, whatever lies in the current folder.

    Before 3.11 Python takes modules from the folder it starts in: PYTHONSAFEPATH is not known there.
    """
    folder = os.environ[FOLDER] = str(Path.cwd())
    os.chdir(KIT)
    try:
        yield
    finally:
        os.environ.pop(FOLDER, None)
        os.chdir(folder)
