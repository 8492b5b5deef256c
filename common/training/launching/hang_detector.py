"""The hang detector: logs the stack of every rank, names the rank that hangs, and ends the run, so that it can restart.

Each rank records its progress (`Heartbeat.beat`), and a watchdog thread publishes it in torchrun's store. The other
ranks soon wait for one that hangs, so all of them are late: the one that hangs has made the least progress, or its
thread has stopped too. nvidia-resiliency-ext (0.4.1) does this and more, with a launcher of its own in place of
torchrun's agent, for NVIDIA GPUs and torch 2.3 or later; two of the platforms here have neither.
"""

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from common.log import listed, logger
from common.training.launching.store_keys import announce, is_set

PREFIX = "kit/heartbeat"
EXIT_CODE = 1
WAITING_FOR_DATA = "waiting for the rank that reads its data"  # of a rank that may wait for one with as many beats


class Heartbeat:
    """A rank's progress: the last finished iteration, the number of beats, its current activity and when that began."""

    def __init__(self) -> None:
        self.iteration, self.count, self.activity, self.since = 0, 0, "starting", time.monotonic()

    def beat(self, activity: str, iteration: int | None = None) -> None:
        """Records that `activity` begins now, which counts as progress."""
        self.iteration = self.iteration if iteration is None else iteration
        self.activity, self.since = activity, time.monotonic()
        self.count += 1


@dataclass(frozen=True)
class Beat:
    """The heartbeat that a rank last published; num_published: how often it has published one."""

    iteration: int
    count: int
    activity: str
    num_published: int

    def __str__(self) -> str:
        return f"after iteration {self.iteration}, {self.activity}"


class HangDetector:
    """A watchdog thread for this rank's heartbeat; ends the process `timeout_s` seconds after the last beat."""

    def __init__(self, heartbeat: Heartbeat, timeout_s: float, rank: int, world_size: int) -> None:
        self.heartbeat, self.timeout_s, self.rank, self.world_size = heartbeat, timeout_s, rank, world_size
        self.interval_s = min(5.0, timeout_s / 10)
        self.num_published = 0
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A client of its own: the process group's is busy while a communicator is set up.
        self.store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.heartbeat.beat(self.heartbeat.activity)
        threading.Thread(target=self._watch, name="hang detector", daemon=True).start()

    def _watch(self) -> None:
        try:
            while True:
                # If a library holds the GIL, this thread stops too, and faulthandler's C thread ends the process.
                faulthandler.dump_traceback_later(self.timeout_s, exit=True)
                self._publish()
                if time.monotonic() - self.heartbeat.since > self.timeout_s:
                    self._report_and_exit()
                time.sleep(self.interval_s)
        except RuntimeError as error:  # the store is gone, and with it the run
            logger.debug("hang detector ended: %s", error)

    def _publish(self) -> None:
        self.num_published += 1
        now = self.heartbeat
        beat = asdict(Beat(now.iteration, now.count, now.activity, self.num_published))
        self.store.set(key := f"{PREFIX}/{self.rank}", json.dumps(beat))
        if self.num_published == 1:
            announce(self.store, key)

    def _report_and_exit(self) -> None:
        beat = self.heartbeat
        logger.warning(
            "rank %d: no progress for %.0f s after iteration %d, %s; its stack:",
            self.rank, time.monotonic() - beat.since, beat.iteration, beat.activity,
        )  # fmt: skip
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
        dump_collectives(self.rank)
        is_reporter = self.store.add(f"{PREFIX}/reporter", 1) == 1
        before = self._read_all() if is_reporter else {}
        for _ in range(3):  # the others' threads publish meanwhile, also where they report at the same time
            self._publish()
            time.sleep(self.interval_s)
        if is_reporter:
            text = who_hangs(before, self._read_all(), self.world_size, self.timeout_s)
            print(f"error: {text}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * self.interval_s)  # torchrun ends the reporter once this process has ended
        os._exit(EXIT_CODE)

    def _read_all(self) -> dict[int, Beat]:
        keys = {rank: f"{PREFIX}/{rank}" for rank in range(self.world_size)}
        return {rank: Beat(**json.loads(self.store.get(key))) for rank, key in keys.items() if is_set(self.store, key)}


def who_hangs(before: dict[int, Beat], now: dict[int, Beat], world_size: int, timeout_s: float) -> str:
    """The message that names the ranks that hang, from the beats of all ranks at two points in time."""
    remedy = "see the stacks above; the run ends, and MAX_RESTARTS restarts it from the newest checkpoint"
    silent = [rank for rank in range(world_size) if rank not in now or (rank in before and before[rank] == now[rank])]
    if silent:
        first = now.get(silent[0])
        text = f"rank {listed(silent)} does not respond (process stopped, or node lost)" + (
            f": {first}" if first else ""
        )
    else:
        fewest = min(beat.count for beat in now.values())
        late = [rank for rank, beat in now.items() if beat.count == fewest]
        late = [rank for rank in late if now[rank].activity != WAITING_FOR_DATA] or late
        text = f"rank {listed(late)} hangs {now[late[0]]}"
        if len(late) == world_size:
            text = f"all ranks hang {now[0]}"
    return f"HANG_TIMEOUT_MIN={timeout_s / 60:g}: {text}; {remedy}"


def dump_collectives(rank: int) -> None:
    """Writes NCCL's flight recorder trace of this rank to a file, if torch has one, and logs its path."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not torch.cuda.is_initialized():
        return
    path = Path(tempfile.gettempdir(), f"nccl_trace_rank_{rank}")
    try:
        path.write_bytes(dump())
        logger.warning(
            "rank %d: flight recorder trace of its last collectives: %s (read it with torchfrtrace)", rank, path
        )
    except (OSError, RuntimeError) as error:
        logger.warning("rank %d: no flight recorder trace: %s", rank, error)
