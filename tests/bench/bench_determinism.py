"""Whether DETERMINISTIC=true gives the same bits, and what it costs: step 3 twice with it and twice without.

    python -m tests.bench.bench_determinism [--model FOLDER --data PREFIX] [--steps N] [-- FLAG ...]

FOLDER holds config.json and the tokenizer, PREFIX is step 1's; without them a tiny model and its data are made. FLAGs
are more of `common.train` (--gpus 2 --tp 2). Each run is the whole command: random weights of the seed, N steps, its
last checkpoint, whose weights are hashed and which is then deleted. tokens/s is the median of the second half of the
steps. Exits 1 unless both deterministic runs end with the same weights, after the same losses and gradient norms.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.logits import CheckpointTensors
from common.model.shape.config import load_config
from common.platforms import detect
from tests.tiny import TEXTS, tiny_qwen

KIT = Path(__file__).parents[2]
STEP = re.compile(r"iteration (\d+)/\d+ +([\d.]+) +([\d.]+) +\S+ +([\d,]+)")  # loss, grad norm, tokens/s
TINY = {"seq-length": 64, "micro-batch-size": 2, "global-batch-size": 16}
LARGE = {"seq-length": 4096, "micro-batch-size": 4, "global-batch-size": 32}


def words(flags: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(KIT), "KIT_PLATFORM": os.environ.get("KIT_PLATFORM") or detect()}


def tiny(folder: Path) -> tuple[Path, Path]:
    """A model's folder, and the prefix of its data."""
    model = tiny_qwen(folder / "model")
    rows = [{"text": f"{i} {TEXTS[i % len(TEXTS)]}"} for i in range(400)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = {"input": folder / "rows.jsonl", "output-prefix": folder / "data", "tokenizer-path": model}
    command = [sys.executable, "-m", "common.preprocess", "pretrain", *words(flags)]
    subprocess.run(command, env=environment(), cwd=KIT, check=True, stdout=subprocess.DEVNULL)
    return model, folder / "data"


def weights_hash(folder: Path, model: Path) -> str:
    """SHA-256 of names and bits of the weights in the newest checkpoint of `folder`."""
    checkpoint = find_checkpoint(folder)
    assert checkpoint
    tensors = CheckpointTensors(checkpoint, load_config(model))
    total = hashlib.sha256()
    for name in sorted(tensors._tensors):
        total.update(name.encode())
        total.update(tensors.tensor(name).contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def train(model: Path, data: str, deterministic: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Result of one run: weights' hash, losses and norms of its steps, tokens/s, and its log line on determinism."""
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        flags = {
            "hf-model-path": model, "dataset-path": data, "save-checkpoint-path": folder, "split": "100,0,0",
            "train-iters": arguments.steps, "save-interval": 10**6, "eval-interval": 0, "log-interval": 1, "lr": 1e-3,
            "min-lr": 1e-4, "deterministic": str(deterministic).lower(), **(LARGE if arguments.model else TINY),
        }  # fmt: skip
        command = [sys.executable, "-m", "common.train", *words(flags), *arguments.flags]
        done = subprocess.run(command, env=environment(), cwd=KIT, text=True, capture_output=True, check=False)
        steps = STEP.findall(done.stderr)
        if done.returncode or len(steps) != arguments.steps:
            sys.exit(
                f"{' '.join(command)}\nended with {done.returncode} after {len(steps)} steps:\n{done.stderr[-6000:]}"
            )
        logged = [
            line.partition("deterministic: ")[2] for line in done.stderr.splitlines() if " deterministic: " in line
        ]
        if bool(logged) != deterministic:
            sys.exit(f"DETERMINISTIC={deterministic}, and the log says of it: {logged or 'nothing'}")
        rates = [float(rate.replace(",", "")) for *_, rate in steps]
        return {
            "deterministic": deterministic, "weights": weights_hash(Path(folder), model),
            "steps": [" ".join(step[:3]) for step in steps], "log": "".join(logged),
            "tokens_per_s": statistics.median(rates[len(rates) // 2 :]),
        }  # fmt: skip


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What differs first; empty where all is the same."""
    for mine, theirs in zip(one["steps"], other["steps"], strict=True):
        if mine != theirs:
            return f"iteration {mine} | {theirs}"
    return "" if one["weights"] == other["weights"] else "the weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work-dir", help="where checkpoints go meanwhile, one at a time; default: the system's")
    parser.add_argument("flags", nargs="*", metavar="FLAG")
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.data):
        parser.error("--model and --data go together")
    with tempfile.TemporaryDirectory() as folder:
        model, data = (arguments.model, arguments.data) if arguments.model else tiny(Path(folder))
        runs = {}
        for deterministic in (True, False):
            runs[deterministic] = [train(model, str(data), deterministic, arguments) for _ in range(2)]
            for run in runs[deterministic]:
                shown = {name: value for name, value in run.items() if name != "steps"}
                print(json.dumps({**shown, "last": run["steps"][-1]}), flush=True)
    differences = {deterministic: first_difference(*both) for deterministic, both in runs.items()}
    fastest = {deterministic: max(run["tokens_per_s"] for run in both) for deterministic, both in runs.items()}
    for deterministic, difference in differences.items():
        print(
            f"DETERMINISTIC={str(deterministic).lower()}: {f'differs: {difference}' if difference else 'the same bits'}"
        )
    share = fastest[True] / fastest[False]
    print(f"tokens/s: {fastest[True]:,.0f} with, {fastest[False]:,.0f} without: {share:.3f} of it")
    sys.exit(bool(differences[True]))


if __name__ == "__main__":
    main()
