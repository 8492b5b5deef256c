"""Measures step 2 against `cp` of the same bytes: both ways, both formats, on a random model of a Qwen2.5 shape.

    python tests/bench/bench_convert.py [--shape 7B] [--folder FOLDER] [--repeats 3]

Each run is a fresh process on files that are not in the page cache (flushed and dropped before), and ends when its
output is on the disk. Conversion and `cp` alternate; the median of the repeats is printed. The verification is timed
separately: seconds of conversion, and CPU seconds, are those of the process with its imports, less the verification's.
Peak memory is the process's RssAnon, sampled fifty times a second: mapped files are not in it. 7B needs 31 GB of disk.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.checkpoint.formats.hf_folder import write_safetensors
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.demo.model import Shape, tensor_shapes

KIT = Path(__file__).parents[2]
SHAPES = {
    "tiny": Shape(hidden_size=256, intermediate_size=512, num_attention_heads=4, vocab_size=20000),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936, True),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936, True),
    "7B": Shape(3584, 18944, 28, 28, 4, 152064, False),
}
MAX_SHARD_BYTES = 4 * 10**9
POOL = 1 << 24
# Runs in a separate process: prints the seconds of the verification, and its CPU seconds.
PROGRAM = """
import sys, time
from common import convert
from common.checkpoint.conversion import common_steps
seconds = []
verify = common_steps.verify
def timed(*given, **named):
    start = time.perf_counter(), time.process_time()
    try:
        return verify(*given, **named)
    finally:
        seconds.extend((time.perf_counter() - start[0], time.process_time() - start[1]))
common_steps.verify = timed
sys.argv = ["convert", *sys.argv[1:]]
convert.main()
print(*seconds)
"""


@dataclass
class Result:
    """One run: seconds and CPU seconds without verification, seconds of verification, bytes of peak RssAnon."""

    work_s: float
    cpu_s: float
    verification_s: float
    peak_bytes: int


def write_model(folder: Path, shape: Shape) -> None:
    """A bf16 model of random bits, none of them infinite or NaN."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    pool = torch.randn(POOL).bfloat16()

    def make(size: tuple[int, ...], start: int) -> torch.Tensor:
        numel = torch.Size(size).numel()
        turned = pool.roll(start)
        return turned.repeat(numel // POOL + 1)[:numel].reshape(size)

    tensors = {
        name: LazyTensor(size, torch.bfloat16, lambda size=size, i=i: [[make(size, 7919 * i)]])
        for i, (name, size) in enumerate(tensor_shapes(shape).items())
    }
    write_safetensors(folder, tensors, MAX_SHARD_BYTES, lambda size: None)
    config = {name: value for name, value in vars(shape).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}))


def settle(folder: Path) -> None:
    """Flushes all of `folder` to the disk and drops it from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(process: "subprocess.Popen[str]", peak: list[int]) -> None:
    """Keeps peak[0] at the largest RssAnon of `process`."""
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        found = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")]
        peak[0] = max(peak[0], *found, 0)
        time.sleep(0.02)


def run(command: list[str], source: Path, target: Path) -> Result:
    """One run from a cold `source`, until `target` is on the disk."""
    settle(source)
    environment = {**os.environ, "PYTHONPATH": str(KIT)}
    start, peak, used = time.perf_counter(), [0], cpu_of_children()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    total = time.perf_counter() - start
    watcher.join()
    verification, verification_cpu = map(float, out.split()[-2:]) if out.strip() else (0.0, 0.0)
    return Result(total - verification, cpu_of_children() - used - verification_cpu, verification, peak[0])


def cpu_of_children() -> float:
    """CPU seconds of all child processes that have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, source: Path, target: Path, command: list[str], repeats: int) -> None:
    """Prints one row; leaves the last run's output in `target`."""
    ours, copies = [], []
    copy = target.with_name("copy")
    for _ in range(repeats):
        copies.append(run(["cp", "-r", str(source), str(copy)], source, copy))
        shutil.rmtree(copy)
        shutil.rmtree(target, ignore_errors=True)
        flags = [f"--load-checkpoint-path={source}", f"--save-checkpoint-path={target}"]
        ours.append(run([sys.executable, "-c", PROGRAM, *command, *flags], source, target))
    work, cpu, verification = (
        statistics.median(getattr(r, each) for r in ours) for each in ("work_s", "cpu_s", "verification_s")
    )
    cp, cp_cpu = (statistics.median(getattr(c, each) for c in copies) for each in ("work_s", "cpu_s"))
    peak = max(result.peak_bytes for result in ours) / 2**20
    figures = f"{work:.1f} | {cp:.1f} | {work / cp:.2f} | {cpu:.1f} | {cp_cpu:.1f} | {verification:.1f} | {peak:.0f}"
    print(f"| {name} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="7B", choices=SHAPES)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=arguments.folder))
    try:
        write_model(work / "hf", SHAPES[arguments.shape])
        size = sum(path.stat().st_size for path in (work / "hf").iterdir())
        print(f"{arguments.shape}, {size / 1e9:.2f} GB, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        columns = (
            "conversion",
            "s",
            "cp, s",
            "times cp",
            "CPU s",
            "cp's CPU s",
            "verification, s",
            "peak RssAnon, MiB",
        )  # fmt: skip
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        kinds = {"TP2 x PP2 torch": ["--tp=2", "--pp=2"], "torch_dist": ["--ckpt-format=torch_dist"]}
        for name, flags in kinds.items():
            there, back = work / "megatron", work / "back"
            measure(f"HF to {name}", work / "hf", there, ["hf-to-megatron", *flags], arguments.repeats)
            shutil.rmtree(work / "hf")  # the disk is small, and it is written again
            measure(f"{name} to HF", there, back, ["megatron-to-hf"], arguments.repeats)
            shutil.rmtree(there)
            back.rename(work / "hf")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
