"""Prints the tables of docs/reliability.md, "Goodput":

    python -m tests.bench.goodput [--disk-gb-s 2 20] [--save-stall-s S] [--detection-s S] [--restart-s S]

A table for each rate of the disk: the best SAVE_INTERVAL by `common.estimate`, of the fastest layout on H100s, and
where the time goes. The last row is Llama 3's 405B on its own file system, to compare with its paper.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common.estimate.goodput import Interruptions, best_interval, best_steps, seconds_between_faults, shares
from common.estimate.gpus import find_gpu
from common.estimate.layouts import EstimateSettings, estimate_all
from common.estimate.upkeep import GB, span, upkeep
from common.model.shape.config import QwenConfig, parse_config

DATA = Path(__file__).parent / "data" / "steps.json"
QWEN_72B = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8}  # fmt: skip
ROWS = ((8, "7B", 256), (64, "7B", 256), (256, "72B", 1024), (1024, "72B", 1024), (16384, "72B", 4096))
HEAD = (
    "| GPUs | model | a fault every | pause per save | best: save every | `SAVE_INTERVAL` | saving | restarting |"
    " repeating | **goodput** | with 100 steps |"
)
# arXiv 2407.21783: 405 billion parameters, section 3.3.1's 2 TB/s, counted as 14 bytes a parameter
LLAMA_3_GPUS, LLAMA_3_BYTES, LLAMA_3_DISK_GB_S = 16384, 14 * 405e9, 2000.0


def models() -> dict[str, QwenConfig]:
    """The shapes of the rows; 72B's vocabulary and the rest are 7B's."""
    shape = json.loads(DATA.read_text(encoding="utf-8"))["shapes"]["7B"]
    return {name: parse_config({**shape, **more}, DATA) for name, more in (("7B", {}), ("72B", QWEN_72B))}


def row(gpus: int, model: str, lost: Interruptions, step: float | None) -> str:
    """One line of the table; with the seconds of a step, at the best whole number of steps."""
    steps = best_steps(lost, step) if step else 0
    interval = steps * step if step else best_interval(lost)
    split = shares(lost, interval)
    now = f"{shares(lost, 100 * step).trains:.1%}" if step else ""
    parts = [f"{part:.1%}" for part in (split.saves, split.recovers, split.repeats)]
    cells = [
        f"{gpus:,}",
        model,
        span(lost.between_faults),
        span(lost.stall),
        span(interval),
        f"{steps:,}" if steps else "",
    ]
    return "| " + " | ".join([*cells, *parts, f"**{split.trains:.1%}**", now]) + " |"


def table(settings: EstimateSettings) -> Iterator[str]:
    """The lines of one table."""
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for gpus, model, batch in ROWS:
        qwen, gpu = models()[model], find_gpu(settings.gpu)
        own = replace(settings, nnodes=gpus // 8, global_batch_size=batch)
        found, _ = estimate_all(own, qwen, gpu)
        assert found[0].fits == "yes" and found[0].speed
        yield row(gpus, model, upkeep(own, qwen).lost, found[0].speed.step_seconds)


def llama_3(settings: EstimateSettings) -> str:
    """The row of Llama 3, whose saves are counted as if training stood still for all of each."""
    save = LLAMA_3_BYTES / (LLAMA_3_DISK_GB_S * GB)
    between = seconds_between_faults(LLAMA_3_GPUS, settings.gpu_mtbf_hours)
    lost = Interruptions(between, save, save, settings.detection_s + settings.restart_s + save)
    return row(LLAMA_3_GPUS, "Llama 3 405B", lost, None)


def main() -> None:
    """Prints a table for each rate of the disk."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.goodput", description=__doc__)
    parser.add_argument("--disk-gb-s", type=float, nargs="+", default=[2.0, 20.0])
    for name in ("save_stall_s", "detection_s", "restart_s", "gpu_mtbf_hours"):
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=getattr(EstimateSettings, name))
    given = vars(parser.parse_args())
    for rate in given.pop("disk_gb_s"):
        settings = EstimateSettings(hf_model_path="-", gpu="H100", gpus=8, seq_length=4096, disk_gb_s=rate, **given)
        print(f"\nCheckpoints at {rate:g} GB/s (Llama 3's at {LLAMA_3_DISK_GB_S:,.0f}):\n")
        print(*table(settings), llama_3(settings), sep="\n")


if __name__ == "__main__":
    main()
