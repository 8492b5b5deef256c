"""An all-reduce between all devices of this node: whether it comes to an end, is right, and how fast it is.

    python -m common.doctor.all_reduce RANK RANKS FOLDER     one of its processes: they meet by a file in FOLDER

Each device has a process of its own, as in training, so that one that hangs or dies is told and not waited for.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from common.doctor.finding import Finding
from common.platforms import current
from common.platforms.base import Platform
from common.start import from_kit

TIMEOUT_S = 180  # eight processes import torch, and NCCL looks for its ways
GRACE_S = 10  # for the others to end, once one has failed
CPU_RANKS = 2
DEVICE_BYTES, CPU_BYTES = 256 << 20, 1 << 20
WARM_UP, TIMES = 3, 10
SECONDS = "seconds of one:"  # before what a process prints; with NCCL_DEBUG set, NCCL prints too
REMEDIES = {
    "nccl": "NCCL_DEBUG=INFO (on MetaX MCCL_DEBUG=INFO) tells why; if NCCL_P2P_DISABLE=1 mends it, the host's IOMMU or"
    " ACS is in the way, if NCCL_SHM_DISABLE=1 does, /dev/shm (--ipc=host)",
    "gloo": "set GLOO_SOCKET_IFNAME to an interface of this machine, as lo",
}


def look_at_all_reduce(platform: Platform, num_devices: int) -> Finding:
    """What the all-reduce gave; with one device there is nothing to try, without any two processes do it by gloo."""
    ranks = num_devices if platform.device == "cuda" else CPU_RANKS
    if ranks == 1:
        return Finding("all-reduce", "ok", "one device: there is nothing to try")
    what = f"{ranks} {'devices' if platform.device == 'cuda' else 'processes'} by {platform.backend}"
    seconds, failure = run(ranks)
    if failure:
        return Finding("all-reduce", "fail", f"{what}: {failure}", REMEDIES[platform.backend])
    size = DEVICE_BYTES if platform.device == "cuda" else CPU_BYTES
    rate = bus_bandwidth(size, ranks, seconds) / 1e9
    return Finding("all-reduce", "ok", f"{what}, {size >> 20} MiB: {rate:.1f} GB/s of bus bandwidth")


def bus_bandwidth(size: int, ranks: int, seconds: float) -> float:
    """Bytes a second of a link, whatever the number of ranks (NVIDIA/nccl-tests, doc/PERFORMANCE.md)."""
    return size / seconds * 2 * (ranks - 1) / ranks


def run(ranks: int) -> tuple[float, str]:
    """(seconds of one all-reduce, what went wrong); one of them is 0 or empty. No process is left behind."""
    command = [sys.executable, "-m", "common.doctor.all_reduce"]
    with tempfile.TemporaryDirectory() as folder:
        said = [(Path(folder) / f"rank{rank}").open("w+", errors="replace") for rank in range(ranks)]
        with from_kit():
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"}
            processes = [
                subprocess.Popen([*command, str(rank), str(ranks), folder], env=environment, stdout=out, stderr=out)
                for rank, out in enumerate(said)
            ]
        try:
            failure = _wait(processes, said)
            seconds = 0.0 if failure else float(_last_line(said[0], SECONDS).removeprefix(SECONDS))
        finally:
            for process, out in zip(processes, said, strict=True):
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # one that the driver holds does not end
                    process.wait(GRACE_S)
                out.close()
    return seconds, failure


def _wait(processes: Sequence[subprocess.Popen[bytes]], said: Sequence[IO[str]]) -> str:
    """What the first process to fail says, or that they hang; empty where all came to their end."""
    end = time.monotonic() + TIMEOUT_S
    failed: list[int] = []
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if not failed and any(codes):
            failed = [rank for rank, code in enumerate(codes) if code]
            end = min(end, time.monotonic() + GRACE_S)
        if None not in codes:
            break
        time.sleep(0.1)
    if failed:
        return f"process {failed[0]} ended with {processes[failed[0]].poll()}: {_last_line(said[failed[0]])}"
    return f"it hung for {TIMEOUT_S} s" if any(process.poll() is None for process in processes) else ""


def _last_line(out: IO[str], begin: str = "") -> str:
    out.seek(0)
    lines = [line.strip() for line in out if line.strip() and line.startswith(begin)]
    return lines[-1] if lines else "no message"


def seconds_of_one(rank: int, ranks: int, folder: str) -> float:
    """Seconds of an all-reduce, the mean of TIMES; raises AssertionError where the sum is wrong."""
    import torch
    import torch.distributed as dist

    platform = current()
    on_device = platform.device == "cuda"
    if on_device:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        platform.backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    size, kind = (DEVICE_BYTES, torch.bfloat16) if on_device else (CPU_BYTES, torch.float32)  # gloo's bf16 is younger
    box: Any = torch.full((size // kind.itemsize,), rank + 1.0, dtype=kind, device=torch.device(platform.device))
    dist.all_reduce(box)
    assert bool((box == ranks * (ranks + 1) / 2).all()), "the sum is wrong"
    box.zero_()  # sums of sums would leave bf16's range
    for _ in range(WARM_UP):
        dist.all_reduce(box)
    wait = torch.cuda.synchronize if on_device else dist.barrier
    wait()
    start = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(box)
    wait()
    seconds = (time.perf_counter() - start) / TIMES
    dist.destroy_process_group()
    return seconds


def main() -> None:
    """One process of it, which prints the seconds, or what went wrong as its last line."""
    rank, ranks, folder = sys.argv[1:]
    try:
        print(SECONDS, seconds_of_one(int(rank), int(ranks), folder), flush=True)
    except Exception as error:  # whatever torch, CUDA and NCCL raise
        print(f"{type(error).__name__}: {cause(str(error))}", flush=True)
        os._exit(1)  # NCCL's own threads may wait for the others


def cause(text: str) -> str:
    """The line that says what went wrong: NCCL's own, which it puts last, or the first."""
    lines = text.partition("Last error:")[2].strip().splitlines() or text.strip().splitlines()
    return lines[0] if lines else "no message"


if __name__ == "__main__":
    main()
