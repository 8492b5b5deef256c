"""Step 3 on the GPUs of one host, beside Megatron-LM on the same: the tables of docs/benchmarks.md, "Several GPUs".

    python -m tests.bench.bench_node --models FOLDER --data PREFIX --out FILE [--gpus N] [--minutes 10]
        [--megatron CHECKOUT] [--starts FOLDER] [--work-dir DIR] [--port PORT] [ROW ...]

FOLDER holds one folder a size with config.json and the tokenizer, PREFIX is step 1's. A ROW is SIZE/LAYOUT, with
OPTIONS after plus signs: 7B/tp2dp4, 7B/dp8+fp8+1024+mb4, 7B/dp8+megatron; without one those of ROWS for N GPUs are run.
Each is the whole command of a user, killed as soon as its log holds ITERATIONS steps; the median of the second half
counts. FILE gets a JSON line a row, with what `common.estimate` says of it. Rows whose figures FILE holds are left out,
and none is begun that would end after `--minutes`: the same command goes on, and says what is left. Adapters start from
--starts, a folder of a checkpoint a size as tests.bench.random_checkpoint writes them. With +sync or +async a row is
two saves and a resume in DIR, with +kills ten kills and resumes (tests/bench/node_saves.py).
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.model.shape.config import load_config
from common.platforms import detect
from common.training.loop.metrics import flops_per_token
from common.tune.trial import end, steps_of
from tests.bench.bench_training import MEGATRON_LOG, MEGATRON_MEMORY, megatron_flags, words
from tests.bench.node_estimate import balanced_layers, estimated
from tests.bench.node_saves import measure_kills, measure_saves

KIT = Path(__file__).parents[2]
ITERATIONS = 6
SECONDS_PER_ROW = 90.0  # assumed until rows were measured: start, compilation and steps
SAMPLES_PER_GPU = {"0.5B": 64, "1.5B": 32, "3B": 32, "7B": 16, "14B": 8, "32B": 8, "72B": 4}
MICRO_BATCH = {"0.5B": 16, "1.5B": 8, "3B": 4, "7B": 1, "14B": 1, "32B": 1, "72B": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"optimizer-state": "bf16"},
    "cpu": {"optimizer-state": "cpu"},
    "cpu-bf16": {"optimizer-state": "cpu_bf16"},
    "fp8": {"fp8-format": "hybrid", "fp8-recipe": "delayed"},
    "even": {},
    "fa4": {"core-attention": "flash_attn_4"},
    "full": {"recompute": "full"},
    "local": {"transformer-impl": "local"},
    "lora": {"tuner": "lora"},
    "overlap": {"tp-comm-overlap": "true"},
    "plain": {"tp-comm-overlap": "false"},
    "unfused": {"fused-products": "false"},
    "1024": {"seq-length": 1024},
    "32k": {"seq-length": 32768},
    "128k": {"seq-length": 131072},
    "reset": {"reset-attention": "true"},
}
SAVES = ("sync", "async")  # two saves and a resume, in place of steps
COUNTED = {"mb": "micro-batch-size", "samples": "global-batch-size"}  # +mb2, +samples64
LAYERS = re.compile(r"layers(\d+(-\d+)+)")  # +layers10-8-10-8: PIPELINE_LAYERS
ROWS: dict[int, tuple[str, ...]] = {
    1: ("3B/dp1", "7B/dp1+bf16"),
    2: ("3B/dp2", "3B/tp2+mb8", "3B/pp2vpp2", "7B/tp2+bf16+mb2", "7B/pp2vpp2+bf16", "0.5B/dp2+kills"),
    4: ("7B/dp4", "7B/tp2dp2", "7B/tp2pp2vpp2", "7B/dp4+fp8+1024+mb4", "7B/dp4+cpu-bf16", "14B/tp4", "14B/tp2pp2",
        "32B/tp4+bf16", "72B/tp4+lora", "7B/tp2dp2+sync", "7B/tp2dp2+async", "7B/tp2dp2+kills"),
    8: ("7B/dp8", "7B/tp2dp4", "7B/pp2vpp2dp4", "7B/dp8+fp8", "7B/dp8+fp8+1024+mb4", "7B/dp8+cpu-bf16", "14B/tp4dp2",
        "14B/tp2pp2dp2", "32B/tp8", "32B/tp4pp2", "72B/tp8+lora", "72B/tp8+cpu-bf16", "7B/dp8+sync", "7B/dp8+async",
        "32B/tp4pp2+sync", "32B/tp4pp2+async", "7B/dp8+kills"),
}  # fmt: skip
# Options of which Megatron-LM has no row.
ALONE = {"cpu", "cpu-bf16", "even", "fa4", "fp8", "kills", "local", "lora", "plain", "reset", "unfused", *SAVES}
MEGATRON_NAMES = ("seq-length", "micro-batch-size", "global-batch-size")
MEGATRON_SIZES = {
    "tp": "tensor-model-parallel-size", "pp": "pipeline-model-parallel-size", "cp": "context-parallel-size",
}  # fmt: skip
MEGATRON_OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"use-precision-aware-optimizer": True, "exp-avg-dtype": "bf16", "exp-avg-sq-dtype": "bf16"},
    "overlap": {"tp-comm-overlap": True},
    "full": {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1},
}  # fmt: skip

Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Row:
    """A row by its name; raises ValueError where the name is not one of a layout on `gpus` GPUs."""

    name: str
    gpus: int

    def __post_init__(self) -> None:
        layout = self.name.split("+")[0].partition("/")[2]
        if "".join(f"{name}{number}" for name, number in self.sizes.items()) != layout:
            raise ValueError(f"{self.name}: {layout!r} is not a layout such as tp2pp2vpp2dp2")
        needed = 1
        for name in ("tp", "pp", "cp", "dp"):
            needed *= self.sizes.get(name, 1)
        if needed != self.gpus:
            raise ValueError(f"{self.name} is for {needed} GPUs, not for {self.gpus}")
        if self.size not in MICRO_BATCH:
            raise ValueError(f"{self.name}: the sizes are {', '.join(MICRO_BATCH)}")
        self.flags  # noqa: B018  (raises for an unknown option)

    @property
    def size(self) -> str:
        """Without what tells one folder of a size from another, as in 7B-128K."""
        return self.folder.split("-")[0]

    @property
    def folder(self) -> str:
        return self.name.split("/")[0]

    @property
    def sizes(self) -> dict[str, int]:
        """Parallel sizes by name, in the order in which they stand."""
        layout = self.name.split("+")[0].partition("/")[2]
        return {name: int(number) for name, number in re.findall(r"(vpp|tp|pp|cp|dp)(\d+)", layout)}

    @property
    def options(self) -> list[str]:
        return self.name.split("+")[1:]

    @property
    def is_megatron(self) -> bool:
        return "megatron" in self.options

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of `common.train`."""
        flags: dict[str, Any] = {
            **{name: number for name, number in self.sizes.items() if name != "dp"}, "gpus": self.gpus,
            "seq-length": 4096, "micro-batch-size": MICRO_BATCH[self.size],
            "global-batch-size": SAMPLES_PER_GPU[self.size] * self.gpus,
        }  # fmt: skip
        for option in self.options:
            counted = re.fullmatch(r"([a-z]+)(\d+)", option)
            if counted and counted[1] in COUNTED:
                flags[COUNTED[counted[1]]] = int(counted[2])
            elif option in OPTIONS:
                flags |= OPTIONS[option]
            elif layers := LAYERS.fullmatch(option):
                flags["pipeline-layers"] = layers[1].replace("-", ",")
            elif option not in ("megatron", "kills", *SAVES):
                raise ValueError(
                    f"{self.name}: {option!r} is none of {', '.join([*OPTIONS, *COUNTED, *SAVES, 'kills', 'megatron'])}"
                )
        return flags


def rows_for(gpus: int, with_megatron: bool) -> list[Row]:
    """ROWS of so many GPUs, each followed by Megatron-LM's where there is one."""
    names = []
    for name in ROWS[gpus]:
        names.append(name)
        if with_megatron and not ALONE & set(name.split("+")):
            names.append(f"{name}+megatron")
    return [Row(name, gpus) for name in names]


def command(row: Row, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The command of a row, which writes to `folder`."""
    model = arguments.models / row.folder
    if row.is_megatron:
        flags = {name: value for name, value in row.flags.items() if name in MEGATRON_NAMES}
        sizes = {MEGATRON_SIZES[name]: number for name, number in row.sizes.items() if name in MEGATRON_SIZES}
        if "vpp" in row.sizes:
            layers = load_config(model).num_hidden_layers
            sizes["num-layers-per-virtual-pipeline-stage"] = layers // (row.sizes["pp"] * row.sizes["vpp"])
        if row.sizes.get("tp", 1) > 1:
            sizes["sequence-parallel"] = True
        more = {name: value for option in row.options for name, value in MEGATRON_OPTIONS.get(option, {}).items()}
        script = words({**megatron_flags(model), **flags, **sizes, **more, "train-iters": 10**6})
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={row.gpus}",
                f"--master-port={arguments.port}", str(arguments.megatron / "pretrain_gpt.py"), *script]  # fmt: skip
    start = (
        {"load-checkpoint-path": arguments.starts / row.folder} if "lora" in row.options else {"hf-model-path": model}
    )
    flags = {
        **start, "dataset-path": arguments.data, "save-checkpoint-path": folder, "save-interval": 10**6,
        "eval-interval": 0, "split": "100,0,0", "train-iters": 10**6, "log-interval": 1, "lr": 1e-4, "min-lr": 1e-5,
        "master-port": arguments.port,
        **row.flags, **balanced(row, arguments),
    }  # fmt: skip
    return [sys.executable, "-m", "common.train", *words(flags)]


def balanced(row: Row, arguments: argparse.Namespace) -> dict[str, str]:
    """PIPELINE_LAYERS as the launcher proposes them, where the row has none; with +even none."""
    if "pipeline-layers" in row.flags or "even" in row.options:
        return {}
    return balanced_layers(load_config(arguments.models / row.folder), row.flags)


def steps_of_megatron(log: Path, row: Row) -> list[dict[str, float]]:
    """Tokens/s over all GPUs of each step so far, and GiB, which Megatron-LM's log tells once, of rank 0."""
    printed = log.read_text(errors="replace")
    tokens = row.flags["global-batch-size"] * row.flags["seq-length"]
    gib = max((float(found[0]) / 2**10 for found in MEGATRON_MEMORY.findall(printed)), default=0.0)
    return [{"tokens_per_s": 1e3 * tokens / float(ms), "memory_gib": gib} for ms in MEGATRON_LOG.findall(printed)]


def launch(row: Row, arguments: argparse.Namespace, folder: Path, more: list[str], log: Path) -> Process:
    """Starts a row's command with `more` flags."""
    environment = {**os.environ, "KIT_PLATFORM": os.environ.get("KIT_PLATFORM") or detect()}
    paths = [str(KIT), *([str(arguments.megatron)] if row.is_megatron else []), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = ":".join(paths)
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as nvidia/env.sh has it
    with log.open("w") as output:
        return subprocess.Popen(
            [*command(row, arguments, folder), *more], env=environment, cwd=KIT, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def measure(row: Row, arguments: argparse.Namespace, until: float) -> dict[str, Any] | None:
    """The row's line, or None if it must go on in a later call."""
    folder = arguments.work_dir / f"bench_node_{row.name.replace('/', '_')}"
    line: dict[str, Any] = {"row": row.name, "gpus": row.gpus}
    began = time.monotonic()
    start = partial(launch, row, arguments, folder)
    try:
        if "kills" in row.options:
            found = measure_kills(start, folder, until=until, limit_s=arguments.timeout)
            if found is None:
                return None
        elif set(SAVES) & set(row.options):
            asynchronous = "async" in row.options
            found = measure_saves(start, folder, row.gpus, asynchronous=asynchronous, limit_s=arguments.timeout)
        else:
            found = measure_steps(row, arguments, folder)
    except RuntimeError as error:
        found = {"failed": str(error)}
    shutil.rmtree(folder, ignore_errors=True)
    return {**line, "seconds": round(time.monotonic() - began, 1), **found}


def measure_steps(row: Row, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens/s, memory and model FLOP/s of a GPU; raises RuntimeError with the end of the log of a run that failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, deadline = folder.with_suffix(".log"), time.monotonic() + arguments.timeout
    process, steps = launch(row, arguments, folder, [], log), list[dict[str, float]]()
    while len(steps) < ITERATIONS and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
        steps = steps_of_megatron(log, row) if row.is_megatron else steps_of(folder)
    end(process)
    if len(steps) < ITERATIONS:
        raise RuntimeError(f"{len(steps)} steps: {log.read_text(errors='replace')[-3000:]}")
    rate = statistics.median(step["tokens_per_s"] for step in steps[ITERATIONS // 2 :]) / row.gpus
    line: dict[str, Any] = {
        "tokens_per_s_gpu": round(rate),
        "gib": round(max(step.get("memory_gib", 0.0) for step in steps), 1),
    }
    qwen, flags = load_config(arguments.models / row.folder), row.flags
    line["tflops"] = round(rate * flops_per_token(qwen, flags["seq-length"]) / 1e12, 1)
    return line if row.is_megatron else {**line, **estimated(qwen, {**flags, **balanced(row, arguments)}, row.gpus)}


def main() -> None:
    """Measures the rows that are not in the file yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a row has failed")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--starts", type=Path, help="folder of a checkpoint a size, for adapters")
    parser.add_argument("--port", type=int, default=29500, help="of the rendezvous; one for each of several at a time")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp"))
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    known = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    asked = [Row(name, arguments.gpus) for name in arguments.rows] or rows_for(arguments.gpus, bool(arguments.megatron))
    left = [row for row in asked if row.name not in {line["row"] for line in known if "failed" not in line}]
    left = [row for row in left if arguments.starts or "lora" not in row.options]
    longest = max([SECONDS_PER_ROW, *(line["seconds"] for line in known)])
    while left and time.monotonic() + longest < until:
        line = measure(left[0], arguments, until)
        if line is None:
            break
        del left[0]
        longest = max(longest, line["seconds"])
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    print("left:", " ".join(row.name for row in left) or "nothing", flush=True)


if __name__ == "__main__":
    main()
