"""A rank that hangs is named, with the stack of every rank, and the run ends so that it can be started again.

Each rank tells what it does (`Heartbeat.beat`); a thread of it puts that into torchrun's store now and then. The others
of a rank that hangs soon wait for it, so all of them are late: the one that hangs is the one that came least far, or
whose thread is silent too. nvidia-resiliency-ext (0.4.1) does this and more, by a launcher of its own in the place of
torchrun's agent, for NVIDIA GPUs and torch from 2.3 on; two of the platforms here are neither.
"""

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from common.log import listed, logger

PREFIX = "kit/heartbeat"
EXIT_CODE = 1


class Heartbeat:
    """What a rank does at the moment."""

    def __init__(self) -> None:
        self.iteration, self.count, self.doing, self.since = 0, 0, "starting", time.monotonic()

    def beat(self, doing: str, iteration: int | None = None) -> None:
        """Tells what begins now, which is progress."""
        self.iteration = self.iteration if iteration is None else iteration
        self.doing, self.since = doing, time.monotonic()
        self.count += 1


@dataclass(frozen=True)
class Beat:
    """What a rank last told, and how often its thread has told something."""

    iteration: int
    count: int
    doing: str
    told: int

    def __str__(self) -> str:
        return f"after iteration {self.iteration}, {self.doing}"


class HangDetector:
    """Watches this rank's heartbeat from a thread; ends the process `timeout_s` seconds after the last beat."""

    def __init__(self, heartbeat: Heartbeat, timeout_s: float, rank: int, world_size: int) -> None:
        self.heartbeat, self.timeout_s, self.rank, self.world_size = heartbeat, timeout_s, rank, world_size
        self.interval_s = min(5.0, timeout_s / 10)
        self.told = 0
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the process group's is busy while a collective is set up.
        self.store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.heartbeat.beat(self.heartbeat.doing)
        threading.Thread(target=self._watch, name="hang detector", daemon=True).start()

    def _watch(self) -> None:
        try:
            while True:
                # Where a library keeps the interpreter, this thread stands still too, and faulthandler's own ends it.
                faulthandler.dump_traceback_later(self.timeout_s, exit=True)
                self._tell()
                if time.monotonic() - self.heartbeat.since > self.timeout_s:
                    self._end()
                time.sleep(self.interval_s)
        except RuntimeError as error:  # the store is gone, and with it the run
            logger.debug("hang detector ended: %s", error)

    def _tell(self) -> None:
        self.told += 1
        now = self.heartbeat
        beat = {"iteration": now.iteration, "count": now.count, "doing": now.doing, "told": self.told}
        self.store.set(f"{PREFIX}/{self.rank}", json.dumps(beat))

    def _end(self) -> None:
        beat = self.heartbeat
        logger.warning(
            "rank %d: no progress for %.0f s after iteration %d, %s; its stack:",
            self.rank, time.monotonic() - beat.since, beat.iteration, beat.doing,
        )  # fmt: skip
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
        dump_collectives(self.rank)
        speaks = self.store.add(f"{PREFIX}/speaker", 1) == 1
        before = self._all() if speaks else {}
        time.sleep(3 * self.interval_s)  # the others' threads tell something meanwhile
        self._tell()
        if speaks:
            print(
                f"error: {who_hangs(before, self._all(), self.world_size, self.timeout_s)}", file=sys.stderr, flush=True
            )
        else:
            time.sleep(2 * self.interval_s)  # else this one's end would end the speaker
        os._exit(EXIT_CODE)

    def _all(self) -> dict[int, Beat]:
        keys = {rank: f"{PREFIX}/{rank}" for rank in range(self.world_size)}
        return {rank: Beat(**json.loads(self.store.get(key))) for rank, key in keys.items() if self.store.check([key])}


def who_hangs(before: dict[int, Beat], now: dict[int, Beat], world_size: int, timeout_s: float) -> str:
    """Which ranks of `world_size` hang, from what all told at two moments; in words."""
    remedy = "the stacks stand above; the run ends here, MAX_RESTARTS starts it again from the newest checkpoint"
    silent = [rank for rank in range(world_size) if rank not in now or (rank in before and before[rank] == now[rank])]
    if silent:
        first = now.get(silent[0])
        text = f"rank {listed(silent)} gives no sign of life (stopped, or its node is gone)" + (
            f": {first}" if first else ""
        )
    else:
        fewest = min(beat.count for beat in now.values())
        late = [rank for rank, beat in now.items() if beat.count == fewest]
        text = f"rank {listed(late)} hangs {now[late[0]]}"
        if len(late) == world_size:
            text = f"all ranks hang {now[0]}"
    return f"HANG_TIMEOUT_MIN={timeout_s / 60:g}: {text}; {remedy}"


def dump_collectives(rank: int) -> None:
    """Writes what NCCL's flight recorder holds of this rank, where torch has one, and says where."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not torch.cuda.is_initialized():
        return
    path = Path(tempfile.gettempdir(), f"nccl_trace_rank_{rank}")
    try:
        path.write_bytes(dump())
        logger.warning("rank %d: its last collectives: %s (torchfrtrace reads it)", rank, path)
    except (OSError, RuntimeError) as error:
        logger.warning("rank %d: no record of its collectives: %s", rank, error)
