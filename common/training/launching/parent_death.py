"""The parent-death signal: no process of a run outlives the one that started it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def set_parent_death_signal() -> None:
    """Has the kernel send SIGKILL to this process when its parent exits, and likewise to each child that it forks.

    Without it, ranks whose launcher was killed would train on and write checkpoints while the user starts the same run
    again, and the data workers of a killed rank, which have its devices open, would hold GPU memory for a while.
    """
    _set_for_this_process()
    os.register_at_fork(after_in_child=_set_for_this_process)


def _set_for_this_process() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
