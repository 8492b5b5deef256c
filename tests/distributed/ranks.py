"""Ranks forked from a process that has imported what they import, which costs each that torchrun starts three seconds.

    python -m tests.distributed.ranks          takes jobs from stdin, a JSON object a line, and answers exit codes

A job's processes are `python -m MODULE WORDS` with the variables that torchrun gives its ranks; without ranks it is one
process with none of them. What the launch and torchrun do themselves is tested where a user's command is run: in
test_stops.py, test_hangs.py, test_disks.py, test_blends.py, tests/nodes and tests/end_to_end.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
from typing import Any

from common import log
from common.engine import installation
from common.platforms.cpu import CPU
from common.training.launching.rank_exit import exit_now


def wait(processes: list[int], seconds: float) -> int:
    """0 when all have succeeded; else the code of the first that has failed, after which the others are killed."""
    end, left = time.monotonic() + seconds, set(processes)
    while left:
        for process in list(left):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                left.remove(process)
                if code := os.waitstatus_to_exitcode(status):
                    return kill(left, code)
        if time.monotonic() > end:
            return kill(left, 124)
        time.sleep(0.01)
    return 0


def kill(processes: set[int], code: int) -> int:
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return code


def act(job: dict[str, Any], rank: int) -> None:
    """Makes this process the job's: its output, its environment, its arguments, its module."""
    log_fd = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log_fd), (2, log_fd)):
        os.dup2(source, target)
    os.environ.update(job["environment"])
    if job["ranks"]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": job["port"]}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="localhost", TORCHELASTIC_RUN_ID="none")
    sys.argv[1:] = job["words"]
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


def main() -> None:
    """Forks each job's processes, until there are no more jobs."""
    log.quiet_libraries()
    installation.prepare(CPU)
    installation.prepare = lambda platform: None  # it is done, and is not to be done twice
    import common.training.loop.run  # noqa: F401  what every rank imports

    gc.freeze()  # else a rank's first collection copies the memory that it shares with the others

    for line in sys.stdin:
        job, processes = json.loads(line), []
        for rank in range(max(1, job["ranks"])):
            process = os.fork()
            if not process:
                act(job, rank)
                exit_now(0)  # as the ranks of the kit end, without a teardown
            processes.append(process)
        print(wait(processes, job["seconds"]), flush=True)


if __name__ == "__main__":
    main()
