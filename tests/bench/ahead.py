"""Imports what a program will need, waits for a line on standard input, and only then runs it.

    python -m tests.bench.ahead MODULE,... TARGET [ARGUMENT ...]

So a benchmark's next program loads its packages while the previous one is measured, without touching the GPU.
TARGET is a script's path, a module or MODULE:FUNCTION.
"""

import importlib
import runpy
import sys


def main() -> None:
    """Runs the target as if it had been started by itself."""
    modules, target = sys.argv[1], sys.argv[2]
    for name in modules.split(","):
        importlib.import_module(name)
    if not sys.stdin.readline():
        sys.exit("its turn never came")  # who would have given it is gone
    sys.argv = sys.argv[2:]
    module, _, function = target.partition(":")
    if function:
        getattr(importlib.import_module(module), function)()
    elif target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
