"""How long a process of a run lives: no longer than the one that started it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that started it has ended, and what it forks when it ends itself.

    Killed, a launcher leaves its ranks: they would train on and write checkpoints while the user starts the same run
    again. And a rank leaves its data workers, which have its devices open: they would keep the GPU's memory a while.
    """
    _die_with_parent()
    os.register_at_fork(after_in_child=_die_with_parent)


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
