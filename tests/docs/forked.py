"""Runs `python -m MODULE ...` for each list of words from stdin in a fork, since torch takes seconds to import.

Prints [[exit status, output], ...]; stdin and output are JSON.
"""

import json
import os
import runpy
import sys


def run(words: list[str]) -> int:
    """The exit status of the module words[0] with the other words as its arguments."""
    sys.argv = list(words)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else bool(exit.code)
    return 0


def forked(words: list[str]) -> tuple[int, str]:
    """(exit status, stdout and stderr) of the module in a process of its own."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        status = run(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


if __name__ == "__main__":
    import torch as torch

    json.dump([forked(words) for words in json.load(sys.stdin)], sys.stdout)
