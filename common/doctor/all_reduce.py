"""An all-reduce between all devices of this node: whether it finishes, is correct, and its bandwidth.

    python -m common.doctor.all_reduce RANK RANKS FOLDER     one of the processes; they rendezvous by a file in FOLDER

Each device has its own process, as in training, so that one that hangs or dies is reported.
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

TIMEOUT_S = 180  # eight processes import torch, and NCCL detects the topology
GRACE_S = 10  # for the others to exit, once one has failed
CPU_RANKS = 2
DEVICE_BYTES, CPU_BYTES = 256 << 20, 1 << 20
WARM_UP, TIMES = 3, 10
SECONDS = "seconds of one:"  # prefix of the printed result; with NCCL_DEBUG set, NCCL prints too
REMEDIES = {
    "nccl": "NCCL_DEBUG=INFO (on MetaX MCCL_DEBUG=INFO) shows why; if NCCL_P2P_DISABLE=1 fixes it, check the host's"
    " IOMMU and ACS, if NCCL_SHM_DISABLE=1 does, /dev/shm (--ipc=host)",
    "gloo": "set GLOO_SOCKET_IFNAME to an interface of this machine, such as lo",
}


def check_all_reduce(platform: Platform, num_devices: int) -> Finding:
    """The result of the all-reduce; on a CPU of two gloo processes, with one device there is none."""
    ranks = num_devices if platform.device == "cuda" else CPU_RANKS
    if ranks == 1:
        return Finding("all-reduce", "ok", "one device: nothing to test")
    what = f"{ranks} {'devices' if platform.device == 'cuda' else 'processes'} over {platform.backend}"
    seconds, failure = run(ranks)
    if failure:
        return Finding("all-reduce", "fail", f"{what}: {failure}", REMEDIES[platform.backend])
    size = DEVICE_BYTES if platform.device == "cuda" else CPU_BYTES
    rate = bus_bandwidth(size, ranks, seconds) / 1e9
    return Finding("all-reduce", "ok", f"{what}, {size >> 20} MiB: {rate:.1f} GB/s of bus bandwidth")


def bus_bandwidth(size: int, ranks: int, seconds: float) -> float:
    """The bus bandwidth in bytes/s, independent of the number of ranks (NVIDIA/nccl-tests, doc/PERFORMANCE.md)."""
    return size / seconds * 2 * (ranks - 1) / ranks


def run(ranks: int) -> tuple[float, str]:
    """(seconds of one all-reduce, "") or (0, what failed). All processes have ended on return."""
    command = [sys.executable, "-m", "common.doctor.all_reduce"]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"rank{rank}").open("w+", errors="replace") for rank in range(ranks)]
        with from_kit():
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"}
            processes = [
                subprocess.Popen([*command, str(rank), str(ranks), folder], env=environment, stdout=out, stderr=out)
                for rank, out in enumerate(outputs)
            ]
        try:
            failure = _wait(processes, outputs)
            seconds = 0.0 if failure else float(_last_line(outputs[0], SECONDS).removeprefix(SECONDS))
        finally:
            for process, out in zip(processes, outputs, strict=True):
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # one that is blocked in the driver does not end
                    process.wait(GRACE_S)
                out.close()
    return seconds, failure


def _wait(processes: Sequence[subprocess.Popen[bytes]], outputs: Sequence[IO[str]]) -> str:
    """The last line of the first process to fail, or that they hang; empty if all succeeded."""
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
        return f"process {failed[0]} ended with {processes[failed[0]].poll()}: {_last_line(outputs[failed[0]])}"
    return f"it hung for {TIMEOUT_S} s" if any(process.poll() is None for process in processes) else ""


def _last_line(out: IO[str], prefix: str = "") -> str:
    out.seek(0)
    lines = [line.strip() for line in out if line.strip() and line.startswith(prefix)]
    return lines[-1] if lines else "no message"


def seconds_of_one(rank: int, ranks: int, folder: str) -> float:
    """Mean seconds of TIMES all-reduces; raises AssertionError if the sum is wrong."""
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
    size, kind = (DEVICE_BYTES, torch.bfloat16) if on_device else (CPU_BYTES, torch.float32)  # older gloo has no bf16
    buffer: Any = torch.full((size // kind.itemsize,), rank + 1.0, dtype=kind, device=torch.device(platform.device))
    dist.all_reduce(buffer)
    assert bool((buffer == ranks * (ranks + 1) / 2).all()), "the sum is wrong"
    buffer.zero_()  # repeated sums would overflow
    for _ in range(WARM_UP):
        dist.all_reduce(buffer)
    wait = torch.cuda.synchronize if on_device else dist.barrier
    wait()
    start = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(buffer)
    wait()
    seconds = (time.perf_counter() - start) / TIMES
    dist.destroy_process_group()
    return seconds


def main() -> None:
    """One of the processes: prints the seconds, or the error as its last line."""
    rank, ranks, folder = sys.argv[1:]
    try:
        print(SECONDS, seconds_of_one(int(rank), int(ranks), folder), flush=True)
    except Exception as error:  # whatever torch, CUDA and NCCL raise
        print(f"{type(error).__name__}: {cause(str(error))}", flush=True)
        os._exit(1)  # NCCL's threads may wait for the other ranks


def cause(text: str) -> str:
    """The line of an error message that names the cause: NCCL's "Last error", otherwise the first line."""
    lines = text.partition("Last error:")[2].strip().splitlines() or text.strip().splitlines()
    return lines[0] if lines else "no message"


if __name__ == "__main__":
    main()
