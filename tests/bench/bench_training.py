"""Step 3 beside what a user would pick instead, one GPU a program, all in one run: the table of docs/benchmarks.md.

    python -m tests.bench.bench_training --models FOLDER --data PREFIX --out FILE
        [--chats PREFIX] [--pairs PREFIX] [--megatron CHECKOUT] [--starts FOLDER] [--gpus N] [ROW ...]

FOLDER holds one folder a size (0.5B, 1.5B, 3B, 7B, 14B) with config.json and the tokenizer. A ROW is size/program, as
3B/fp8; without one all are run, on N GPUs at once. A program runs ITERATIONS steps with its own log, and the median of
the second half counts: for step 3 that is the whole loop, `common.train`, and first_step_s the seconds from its first
line to that of its first step. Its packages are imported while the program before it is measured. FILE gets a JSON line
a row; a program that fails is a line too, with the end of what it printed.
"""

import argparse
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.model.shape.config import QwenConfig, load_config
from common.training.loop.metrics import flops_per_token
from common.training.settings.lora import LoraSettings

KIT = Path(__file__).parents[2]
ITERATIONS = 5
SEQ_LENGTH = 4096
BATCH = {"0.5B": 64, "1.5B": 32, "3B": 48, "7B": 32, "14B": 16, "32B": 8}  # samples a step, the same for every program
MICRO_BATCH = {"0.5B": 16, "1.5B": 8, "3B": 4, "7B": 1, "14B": 1, "32B": 1}
BF16_STATE = {"optimizer-state": "bf16"}
FP8_DELAYED = {"fp8-format": "hybrid", "fp8-recipe": "delayed"}
SHORT = {"seq-length": 1024, "global-batch-size": 128}
# size/program -> what differs from the size's row: flags of common.train, or of the other program.
ROWS: dict[str, dict[str, Any]] = {
    "0.5B/kit": {},
    "0.5B/unfused": {"fused-products": "false"},
    "0.5B/local": {"transformer-impl": "local"},
    "0.5B/megatron": {},
    "0.5B/hf": {"micro-batch-size": 4},
    "1.5B/kit": {},
    "1.5B/unfused": {"fused-products": "false"},
    "1.5B/local": {"transformer-impl": "local"},
    "1.5B/megatron": {},
    "1.5B/hf": {"micro-batch-size": 2},
    "3B/kit": {"micro-batch-size": 8},
    "3B/kit-4": {},
    "3B/unfused": {"fused-products": "false"},
    "3B/local": {"transformer-impl": "local", "micro-batch-size": 8},
    "3B/fp8": {"fp8-format": "hybrid"},
    "3B/fp8-delayed": {"fp8-format": "hybrid", "fp8-recipe": "delayed"},
    "3B/megatron": {},
    "3B/hf": {"micro-batch-size": 2},
    "7B/kit": {**BF16_STATE, "micro-batch-size": 2},
    "7B/kit-1": BF16_STATE,
    "7B/unfused": {**BF16_STATE, "fused-products": "false"},
    "7B/fp8": {**BF16_STATE, **FP8_DELAYED, "micro-batch-size": 2},
    "7B/fp8-1": {**BF16_STATE, **FP8_DELAYED},
    "7B/megatron": {"use-precision-aware-optimizer": True, "exp-avg-dtype": "bf16", "exp-avg-sq-dtype": "bf16"},
    "7B/hf": {},
    # The optimizer's state in host memory.
    "7B/cpu": {"optimizer-state": "cpu"},
    "7B/cpu-bf16": {"optimizer-state": "cpu_bf16"},
    "14B/cpu-bf16": {"optimizer-state": "cpu_bf16"},
    # Adapters, rank 16, on a checkpoint of --starts, which tests.bench.random_checkpoint wrote.
    "7B/lora": {"tuner": "lora", "micro-batch-size": 2},
    "7B/lora-4": {"tuner": "lora", "micro-batch-size": 4},
    "7B/lora-fp8": {"tuner": "lora", "micro-batch-size": 2, "fp8-format": "hybrid"},
    "7B/hf-lora": {"micro-batch-size": 2, "lora": 16},
    "32B/lora": {"tuner": "lora", "micro-batch-size": 1},
    # The chosen answers of --pairs as conversations, and the pairs, from a checkpoint of --starts.
    "3B/sft": {"train-mode": "finetune", "truncate": "drop", "packing": "true"},
    "3B/dpo": {"train-mode": "dpo", "truncate": "drop", "packing": "true"},
    "7B/lora-dpo": {"train-mode": "dpo", "truncate": "drop", "packing": "true", "tuner": "lora", "micro-batch-size": 2},
    # FP8 at the length of LLM.Q's table.
    "7B/fp8-1024": {**BF16_STATE, **FP8_DELAYED, **SHORT, "micro-batch-size": 8},
    "7B/fp8-1024-4": {**BF16_STATE, **FP8_DELAYED, **SHORT, "micro-batch-size": 4},
    # Conversations of unequal length, a row each or packed: the tokens of a row count, padding too.
    "0.5B/padded": {"train-mode": "finetune", "truncate": "drop"},
    "0.5B/packed": {"train-mode": "finetune", "truncate": "drop", "packing": "true"},
    # For the estimate of memory: other lengths, micro-batches and recomputation.
    "0.5B/kit-4": {"micro-batch-size": 4, "global-batch-size": 16},
    "0.5B/kit-8k": {"seq-length": 8192, "micro-batch-size": 4, "global-batch-size": 16},
    "0.5B/kit-full": {"recompute": "full", "micro-batch-size": 8, "global-batch-size": 16},
    "1.5B/kit-8k": {"seq-length": 8192, "micro-batch-size": 2, "global-batch-size": 8},
    "1.5B/kit-full": {"recompute": "full", "micro-batch-size": 4, "global-batch-size": 16},
    "3B/kit-1": {"micro-batch-size": 1, "global-batch-size": 4},
    "3B/kit-full": {"recompute": "full", "micro-batch-size": 2, "global-batch-size": 8},
    "7B/kit-full": {**BF16_STATE, "recompute": "full", "micro-batch-size": 2},
}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
LOG = re.compile(r"iteration (\d+)/\d+ .*? \d\.\d\de[+-]\d\d +([\d,]+)")  # tokens/s, which follow the learning rate
LINE = re.compile(r"^(\d\d-\d\d \d\d:\d\d:\d\d) (.*)$", re.MULTILINE)  # of the kit's log
MEMORY = re.compile(r"GiB allocated / reserved / total: ([\d.]+) / ([\d.]+)")
HOST = re.compile(r"host memory for the optimizer: [\d.]+ GiB in ([\d.]+) s")
MEGATRON_LOG = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
MEGATRON_MEMORY = re.compile(r"max allocated: ([\d.]+) \|.*max reserved: ([\d.]+)")


def words(flags: dict[str, Any]) -> list[str]:
    """The command line of `flags`; True is a flag without a value."""
    return [word for name, value in flags.items() for word in ([f"--{name}"] + ([] if value is True else [str(value)]))]


def needs_start(flags: dict[str, Any]) -> bool:
    """Whether a row trains adapters or preferences, which start from a checkpoint."""
    return "tuner" in flags or flags.get("train-mode") == "dpo"


def kit(model: Path, data: str, flags: dict[str, Any], port: int, starts: Path | None) -> list[str]:
    start = {"load-checkpoint-path": starts / model.name} if needs_start(flags) and starts else {"hf-model-path": model}
    flags = {
        **start, "dataset-path": data, "save-checkpoint-path": f"/tmp/bench_training_{port}",
        "save-interval": 10**6, "eval-interval": 0, "split": "100,0,0", "train-iters": ITERATIONS, "log-interval": 1,
        "lr": 1e-4, "min-lr": 1e-5, "master-port": port, "ckpt-format": "torch", **flags,
    }  # fmt: skip
    # Nothing is to be written: what is measured ends before.
    return ahead("torch,transformer_engine.pytorch", "tests.bench.bench_training:without_saving", flags)


def ahead(modules: str, target: str, flags: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "tests.bench.ahead", modules, target, *words(flags)]


def without_saving() -> None:
    """`common.train` in this one process, that saves nothing."""
    os.environ.update(ALONE, TORCHELASTIC_RUN_ID="1")
    os.environ["MASTER_PORT"] = sys.argv[sys.argv.index("--master-port") + 1]
    from unittest.mock import patch

    from common import train

    with patch(
        "common.training.checkpointing.checkpointer.Checkpointer.save"
    ):  # a bench of steps; bench_save.py measures saves
        train.main()


def megatron_flags(model: Path) -> dict[str, Any]:
    """Flags of Megatron-LM's pretrain_gpt.py for a model's shape, its best ones, without layout, batch and length."""
    qwen = load_config(model)
    shape = {
        "num-layers": qwen.num_hidden_layers, "hidden-size": qwen.hidden_size,
        "ffn-hidden-size": qwen.intermediate_size,
        "num-attention-heads": qwen.num_attention_heads, "group-query-attention": True, "kv-channels": qwen.head_dim,
        "num-query-groups": qwen.num_key_value_heads, "swiglu": True, "normalization": "RMSNorm", "norm-epsilon": 1e-6,
        "disable-bias-linear": True, "add-qkv-bias": True, "position-embedding-type": "rope", "rotary-base": 1000000,
        "hidden-dropout": 0, "attention-dropout": 0, "max-position-embeddings": 32768,
        "tokenizer-type": "NullTokenizer", "vocab-size": qwen.vocab_size - 1,
    }  # fmt: skip
    if not qwen.tie_word_embeddings:
        shape["untie-embeddings-and-output-weights"] = True
    run = {
        "bf16": True, "transformer-impl": "transformer_engine", "use-distributed-optimizer": True, "mock-data": True,
        "cross-entropy-loss-fusion": True, "cross-entropy-fusion-impl": "te", "attention-backend": "auto",
        "no-create-attention-mask-in-dataloader": True, "no-gradient-accumulation-fusion": True, "split": "100,0,0",
        "train-iters": ITERATIONS, "log-interval": 1, "eval-iters": 0, "eval-interval": 10**6,
        "lr": 1e-4, "min-lr": 1e-5, "lr-decay-style": "cosine", "weight-decay": 0.1, "clip-grad": 1.0,
        "overlap-grad-reduce": True, "overlap-param-gather": True,
    }  # fmt: skip
    return {**shape, **run}


def megatron(model: Path, checkout: Path, flags: dict[str, Any]) -> list[str]:
    script = str(checkout / "pretrain_gpt.py")
    return ahead("torch,transformer_engine.pytorch,megatron.core", script, {**megatron_flags(model), **flags})


def hugging_face(model: Path, flags: dict[str, Any]) -> list[str]:
    flags = {"model": model, "iterations": ITERATIONS, **flags}
    return ahead("torch,transformers.models.qwen2.modeling_qwen2", "tests.bench.hf_training", flags)


def figures(program: str, printed: str, qwen: QwenConfig, flags: dict[str, Any]) -> dict[str, float]:
    """tokens/s, TFLOP/s and peak GiB of what a program printed, and the seconds to the end of the kit's first step."""
    if program.startswith("hf"):
        return json.loads(printed.strip().splitlines()[-1])
    tokens = flags["global-batch-size"] * flags["seq-length"]
    if program == "megatron":
        rates = [tokens / float(ms) * 1e3 for ms in MEGATRON_LOG.findall(printed)]
        allocated, reserved = (float(mib) / 2**10 for mib in MEGATRON_MEMORY.findall(printed)[-1])
    else:
        rates = [float(rate.replace(",", "")) for _, rate in LOG.findall(printed)]
        allocated, reserved = map(float, MEMORY.findall(printed)[-1])
    assert len(rates) >= ITERATIONS - 1, f"{len(rates)} iterations"
    rate = statistics.median(rates[len(rates) // 2 :])
    lora = LoraSettings(tuner=flags.get("tuner", "full")).lora
    tflops = rate * flops_per_token(qwen, flags["seq-length"], lora) / 1e12
    first = {} if program == "megatron" else {"first_step_s": first_step_seconds(printed)}
    if host := HOST.search(printed):
        first["host_memory_s"] = float(host[1])
    return {"tokens_per_s": rate, "tflops": tflops, "allocated_gib": allocated, "reserved_gib": reserved, **first}


def first_step_seconds(printed: str) -> float:
    """Seconds from the first line of the kit's log to that of its first step, whole ones: so it dates its lines."""
    lines = LINE.findall(printed)
    ends = [next(time for time, text in lines if text.startswith(start)) for start in ("", "iteration 1/")]
    began, ended = (datetime.strptime(f"2000-{time}", "%Y-%m-%d %H:%M:%S") for time in ends)
    return (ended - began).total_seconds()


def data_of(flags: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The OUTPUT_PREFIX that a row trains on."""
    if flags.get("train-mode") == "dpo":
        return arguments.pairs
    return arguments.chats if "train-mode" in flags else arguments.data


@dataclass
class Started:
    """A program that is started ahead and waits for its turn."""

    row: str
    flags: dict[str, Any]
    process: subprocess.Popen[str]


def start(row: str, gpu: int, arguments: argparse.Namespace) -> Started:
    size, program = row.split("/")
    model, port = arguments.models / size, 29600 + gpu
    flags = {"seq-length": SEQ_LENGTH, "micro-batch-size": MICRO_BATCH[size], "global-batch-size": BATCH[size]}
    flags.update(ROWS[row])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if program == "megatron":
        command = megatron(model, arguments.megatron, flags)
        environment.update(ALONE, MASTER_PORT=str(port))
        environment["PYTHONPATH"] = f"{arguments.megatron}:{os.environ.get('PYTHONPATH', '')}"
    elif program.startswith("hf"):
        command = hugging_face(model, flags)
    else:
        command = kit(model, data_of(flags, arguments), flags, port, arguments.starts)
    process = subprocess.Popen(
        command, env=environment, text=True, cwd=KIT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Started(row, flags, process)


def measure(started: Started, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row's line: its settings, and its figures or why there are none."""
    (size, program), flags, process = started.row.split("/"), started.flags, started.process
    begin = time.monotonic()
    try:
        printed, _ = process.communicate("\n", timeout=arguments.timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        printed += f"\nover {arguments.timeout:.0f} s"
    line = {"row": started.row, **flags, "seconds": round(time.monotonic() - begin, 1)}
    try:
        assert process.returncode == 0 or program == "megatron"
        return {**line, **figures(program, printed, load_config(arguments.models / size), flags)}
    except (AssertionError, IndexError, ValueError, KeyError) as error:
        return {**line, "failed": f"{type(error).__name__} {error}", "printed": printed[-2500:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", choices=[[], *ROWS])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--chats", help="OUTPUT_PREFIX of step 1 for fine-tuning")
    parser.add_argument("--pairs", help="OUTPUT_PREFIX of step 1 for preferences")
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--starts", type=Path, help="folder of a checkpoint a size, for adapters")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--first-gpu", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=240)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    for row in arguments.rows or ROWS:
        available = {"megatron": arguments.megatron, "padded": arguments.chats, "packed": arguments.chats}
        available |= {"sft": arguments.chats, "dpo": arguments.pairs, "lora-dpo": arguments.pairs}
        available |= {"lora": arguments.starts, "lora-4": arguments.starts, "lora-fp8": arguments.starts}
        if available.get(row.split("/")[1], True):
            left.put(row)

    def following(gpu: int) -> Started | None:
        try:
            return start(left.get_nowait(), gpu, arguments)
        except queue.Empty:
            return None

    def work(gpu: int) -> None:
        upcoming = following(gpu)
        while upcoming:
            started, upcoming = upcoming, following(gpu)
            line = measure(started, arguments)
            with lock, arguments.out.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
                print({name: value for name, value in line.items() if name != "printed"}, flush=True)

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(arguments.first_gpu + gpu,)) for gpu in range(arguments.gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
