"""What saving costs step 3: size, time blocked, time to the disk, memory of GPU and host, steps meanwhile.

    python -m tests.bench.bench_save --models FOLDER --data PREFIX --out FILE [--work-dir DIR] [--saves N] ROW ...

FOLDER holds one folder a size with config.json and the tokenizer, PREFIX is step 1's. A ROW is size/kind, with flags of
`common.train` after commas: 1.5B/sync, 3B/async, 0.5B/sync,gpus=2,tp=2, 7B/sync,optimizer-state=bf16. Kinds: sync,
async, weights (without the optimizer). Each row is the whole command: N saves, two steps apart; what is written is
removed as soon as it is complete, so that the disk needs room for one. `dd oflag=direct` writes beside it with as many
processes as there are ranks, in the same place, before. FILE gets a JSON line a row.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from common.platforms import detect
from tests.bench.bench_training import LOG

KIT = Path(__file__).parents[2]
MICRO_BATCH = {"0.5B": 8, "1.5B": 4, "3B": 2, "7B": 1}
KINDS: dict[str, dict[str, Any]] = {
    "sync": {}, "async": {"async-save": "true"}, "weights": {"save-optimizer": "false"},
}  # fmt: skip
SAVED = re.compile(r"saved (\S+): ([\d.]+) MB in ([\d.]+) s .*?(?:training paused ([\d.]+) s)?$")
DD_BYTES = 4 << 30


def dd(folder: Path, processes: int) -> float:
    """GB/s of `processes` that write together past the page cache."""
    blocks = DD_BYTES // processes >> 24
    began = time.monotonic()
    running = [
        subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={folder}/dd_{i}", "bs=16M", f"count={blocks}", "oflag=direct", "conv=fsync"],
            stderr=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    failed = any(each.wait() for each in running)
    seconds = time.monotonic() - began
    for i in range(processes):
        (folder / f"dd_{i}").unlink(missing_ok=True)
    return 0.0 if failed else processes * (blocks << 24) / seconds / 1e9  # a tmpfs knows no direct access


class Watch:
    """The most memory of any GPU (MiB, of all processes) and of any rank (GiB) so far, ten times a second."""

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.gpu_mib, self.host_gib, self.over = process, 0, 0.0, False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.over:
            if shutil.which("nvidia-smi"):
                used_mib = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
                self.gpu_mib = max([self.gpu_mib, *map(int, used_mib)])
            for rank in self.process.children():
                try:
                    self.host_gib = max(self.host_gib, rank.memory_info().rss / 2**30)
                except psutil.Error:
                    continue
            time.sleep(0.1)


def measure(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    (size, kind), *more = row.split(",")[0].split("/"), *row.split(",")[1:]
    folder = Path(arguments.work_dir) / "bench_save"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = {
        "hf-model-path": f"{arguments.models}/{size}", "dataset-path": arguments.data, "save-checkpoint-path": folder,
        "split": "100,0,0", "seq-length": arguments.seq_length, "micro-batch-size": MICRO_BATCH[size],
        "global-batch-size": 4 * MICRO_BATCH[size], "train-iters": arguments.every * arguments.saves + 1,
        "save-interval": arguments.every, "eval-interval": 0, "log-interval": 1, "lr": 1e-4, "min-lr": 1e-5,
        "num-workers": 2, **KINDS[kind], **dict(each.split("=") for each in more),
    }  # fmt: skip
    processes = int(flags.get("gpus", 1))
    disk = dd(folder, processes)
    command = [sys.executable, "-m", "common.train", *(f"--{name}={value}" for name, value in flags.items())]
    environment = {**os.environ, "PYTHONPATH": f"{KIT}:{os.environ.get('PYTHONPATH', '')}"}
    environment["KIT_PLATFORM"] = os.environ.get("KIT_PLATFORM") or detect()
    process = subprocess.Popen(command, env=environment, cwd=KIT, text=True, stderr=subprocess.PIPE)
    watch = Watch(psutil.Process(process.pid))
    saves: list[dict[str, float]] = []
    steps: dict[int, float] = {}
    before: dict[str, Any] = {}
    lines = []
    tokens = int(flags["global-batch-size"]) * int(flags["seq-length"])
    assert process.stderr
    for line in process.stderr:
        lines.append(line)
        if found := LOG.search(line):
            steps[int(found[1])] = 1e3 * tokens / float(found[2].replace(",", ""))
            if not saves and int(found[1]) < arguments.every:
                before = {"gpu_mib": watch.gpu_mib, "host_gib": round(watch.host_gib, 2)}
        if found := SAVED.search(line.rstrip()):
            seconds = float(found[3])
            saves.append({"gb": float(found[2]) / 1e3, "s": seconds, "stood_still_s": float(found[4] or seconds)})
            shutil.rmtree(found[1])
    watch.over = True
    shutil.rmtree(folder, ignore_errors=True)
    found_rate = statistics.median(steps.values()) if steps else 0
    result = {"row": row, "dd_gb_s": round(disk, 2), "saves": saves, "before": before, "step_ms": found_rate}
    result |= {"steps_ms": steps, "at_most": {"gpu_mib": watch.gpu_mib, "host_gib": round(watch.host_gib, 2)}}
    for save in saves:
        save["gb_s"] = round(save["gb"] / save["s"], 2)
    return result if not process.wait() else {**result, "failed": "".join(lines[-30:])[-3000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="+", metavar="ROW")
    parser.add_argument("--models", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work-dir", default="/tmp")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=4096)
    arguments = parser.parse_args()
    for row in arguments.rows:
        result = measure(row, arguments)
        print(json.dumps({name: value for name, value in result.items() if name != "steps_ms"}), flush=True)
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
