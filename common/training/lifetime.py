"""How long a process of a run lives: no longer than the one that started it."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that started it has ended.

    Killed, a launcher leaves its ranks: they would train on and write checkpoints while the user starts the same run
    again. And a rank leaves the process that Megatron-Core has it spawn for the queue of a torch_dist checkpoint.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
