"""Fits the constants of `common.estimate` to measured steps, and validates them on others:

    python -m tests.bench.fit_estimate [tests/bench/data/steps.json]

The file holds `shapes`, config.json fields by name, and `rows`, a run each: gpu, shape, seq, mbs, gbs, impl, recompute,
allocated_gib (torch.cuda.max_memory_allocated), and optionally:

    optimizer_state            default: fp32
    fused_products             true: with requirements/hopper.txt
    reserved_gib, tokens_per_s
    kernel_s                   seconds of a step in the kernels of a name in constants.SECONDS
    packing                    its memory is validated; its rate depends on the lengths of the samples, and is not
    read_after_step            1: the peak is that of the first step, whose passes run before Adam makes its moments
    before_kernels             true: before kernels/swiglu.py and qkv_rope.py; its rate is fitted with more memory
                               traffic, of a share fitted too, and not judged

Rows of the shapes and the length in FITTED are fitted, the others judged. Exits 1 where a judged peak is off by more
than 10%, or common/estimate/constants.py holds other values.
"""

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.estimate import constants
from common.estimate.gpus import find_gpu
from common.estimate.layouts import Estimate, estimate
from common.estimate.memory import trained_parameters, work_of
from common.estimate.speed import Cost, add, chunk_costs, step_cost
from common.estimate.weights import MASTER_BYTES, MOMENT_BYTES, Chunk
from common.model.shape.config import QwenConfig, parse_config
from common.training.settings import TrainSettings

DATA = Path(__file__).parent / "data" / "steps.json"
FITTED = {"shapes": ("0.5B", "3B"), "seq": 4096}
BOUND = 0.10
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Step:
    """A measured step with its estimate."""

    row: dict[str, Any]
    estimate: Estimate
    cost: Cost  # of the whole step

    @property
    def fitted(self) -> bool:
        return self.row["shape"] in FITTED["shapes"] and self.row["seq"] == FITTED["seq"]

    @property
    def rate(self) -> float | None:
        """Measured tokens/s, where they depend only on what the estimate knows."""
        return None if self.row.get("packing") else self.row.get("tokens_per_s")

    @property
    def old(self) -> bool:
        return bool(self.row.get("before_kernels"))

    @property
    def impl(self) -> str:
        return str(self.row["impl"])

    @property
    def peak(self) -> int:
        """The estimated peak, of the first step where that was measured."""
        rank = self.estimate.largest
        if self.row.get("read_after_step") != 1:
            return rank.peak
        kind = self.estimate.settings.optimizer_state
        late = MOMENT_BYTES[kind] + (MASTER_BYTES["bf16"] if kind == "bf16" else 0)  # FusedAdam makes its own masters
        after = rank.state.total + rank.step + rank.workspace
        return max(rank.peak - late * rank.parameters, after)

    @property
    def decided_by(self) -> str:
        """What makes up the peak: the passes with their activations, or the state alone with what Adam needs."""
        rank = self.estimate.largest
        return "state" if self.peak <= rank.state.total + rank.step + rank.workspace else "passes"

    @property
    def beyond(self) -> float:
        """Bytes beyond the formulas, attributed to the libraries' fixed size."""
        return self.row["allocated_gib"] * GIB - (self.peak - constants.WORKSPACE_BYTES[self.impl])


def read_steps(path: Path) -> list[Step]:
    measured = json.loads(path.read_text())
    shapes = {name: parse_config(values, path) for name, values in measured["shapes"].items()}
    return [read_step(row, shapes[row["shape"]]) for row in measured["rows"]]


def read_step(row: dict[str, Any], qwen: QwenConfig) -> Step:
    gpu = find_gpu(row["gpu"])
    settings = TrainSettings(
        save_checkpoint_path="-", dataset_path="-", train_iters=1, seq_length=row["seq"], micro_batch_size=row["mbs"],
        global_batch_size=row["gbs"], transformer_impl=row["impl"], recompute=row["recompute"],
        optimizer_state=row.get("optimizer_state", "fp32"), packing=row.get("packing", False),
        fused_products=row.get("fused_products", "false"),
        train_mode="finetune" if row.get("packing") else "pretrain",
    )  # fmt: skip
    work, chunk = work_of(settings, gpu.platform, qwen), Chunk(qwen.num_hidden_layers, True, True)
    number = row["gbs"] // row["mbs"]
    passes = {name: number * amount for name, amount in chunk_costs(work, [chunk], gpu)[chunk].items()}
    own = step_cost(work, chunk.num_layers, trained_parameters(work, chunk), gpu, 1)
    return Step(row, estimate(settings, qwen, gpu), add(passes, own))


def fit_workspace(steps: list[Step]) -> dict[str, int]:
    """The mean of what is beyond the formulas for each kind of layers, in whole MiB."""
    beyond = {impl: [step.beyond for step in steps if step.impl == impl] for impl in constants.WORKSPACE_BYTES}
    return {impl: round(sum(each) / len(each) / MIB) * MIB for impl, each in beyond.items() if each}


def fit_reserved(steps: list[Step]) -> float | None:
    """The largest share of reserved to allocated memory."""
    shares = [step.row["reserved_gib"] / step.row["allocated_gib"] for step in steps if "reserved_gib" in step.row]
    return round(max(shares), 3) if shares else None


def fit_seconds(steps: list[Step]) -> dict[str, float]:
    """The rates of `constants.SECONDS`, none below 0: of kernels their measured time, of the rest what explains steps.

    The latter are those whose steps' relative errors are the least squares.
    """
    kernels: dict[str, list[float]] = {}
    for step in steps:
        for name, seconds in step.row.get("kernel_s", {}).items():
            kernels.setdefault(name, []).append(seconds / step.cost[name])
    rates = {name: round(sum(each) / len(each), 2) for name, each in kernels.items()}
    timed = [step for step in steps if step.rate]
    seconds = np.array([step.row["gbs"] * step.row["seq"] / step.rate for step in timed])
    known = np.array([sum(rate * step.cost.get(name, 0.0) for name, rate in rates.items()) for step in timed])
    names = [name for name in constants.SECONDS if name not in rates]
    costs = np.array(
        [[*(step.cost.get(name, 0.0) for name in names), step.old * step.cost["traffic"]] for step in timed]
    )
    found = least_squares(costs / seconds[:, None], 1 - known / seconds)
    return {**rates, **{name: float(f"{rate:.3g}") for name, rate in zip(names, found[:-1], strict=True)}}


def least_squares(table: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x without a value below 0 for which table [rows, columns] times x is nearest to `target` [rows].

    There are few columns, so each choice of those that are not 0 is tried.
    """
    best, error = np.zeros(table.shape[1]), float("inf")
    for size in range(1, table.shape[1] + 1):
        for columns in map(list, itertools.combinations(range(table.shape[1]), size)):
            found, *_ = np.linalg.lstsq(table[:, columns], target, rcond=None)
            off = float(((table[:, columns] @ found - target) ** 2).sum())
            if (found >= 0).all() and off < error * (1 - 1e-9):
                best, error = np.zeros(table.shape[1]), off
                best[columns] = found
    return best


def table(steps: list[Step]) -> list[str]:
    """A row a step in Markdown."""
    lines = [
        "| GPU, model, layers | sequence, micro-batch, batch | recompute | peak GiB | estimated | decided by"
        " | tokens/s | estimated | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for step in sorted(steps, key=lambda step: not step.fitted):
        row, peak, measured = step.row, step.peak / GIB, step.row["allocated_gib"]
        packed = (", fused" if row.get("fused_products") == "true" else "") + (", packed" if row.get("packing") else "")
        sizes = f"{row['gpu']}, {row['shape']}, {row['impl']}{packed}", f"{row['seq']}, {row['mbs']}, {row['gbs']}"
        cells = [
            *sizes, row["recompute"], f"{measured:.1f}", f"{peak:.2f} ({peak / measured - 1:+.1%})",
            step.decided_by, "", "", "fitted" if step.fitted else "judged",
        ]  # fmt: skip
        if step.rate and step.estimate.speed and not step.old:
            rate = step.estimate.speed.tokens_per_second
            cells[6:8] = f"{step.rate:,.0f}", f"{rate:,.0f} ({rate / step.rate - 1:+.1%})"
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fit_estimate")
    parser.add_argument("data", nargs="?", type=Path, default=DATA)
    steps = read_steps(parser.parse_args().data)
    fitted = [step for step in steps if step.fitted]
    print(*table(steps), sep="\n")
    found = {
        "WORKSPACE_BYTES": fit_workspace(fitted),
        "RESERVED_SHARE": fit_reserved(fitted),
        "SECONDS": fit_seconds(fitted),
    }
    differing = {name: value for name, value in found.items() if value and value != getattr(constants, name)}
    print("\nfitted:", *(f"{name} = {value}" for name, value in found.items()), sep="\n")
    if differing:
        print(f"common/estimate/constants.py holds other {', '.join(differing)}: put these there")
    errors = {step.peak / GIB / step.row["allocated_gib"] - 1 for step in steps if not step.fitted}
    worst = max(errors, key=abs, default=0.0)
    print(f"judged: {len(steps) - len(fitted)} steps, the worst peak off by {worst:+.1%}, allowed {BOUND:.0%}")
    return int(bool(differing) or abs(worst) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
