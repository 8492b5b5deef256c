"""An estimate as a table for people, or as plain values for programs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from common.estimate.gpus import MEASURED, Gpu
from common.estimate.layouts import Estimate, EstimateSettings, Refusal
from common.estimate.memory import RankMemory, work_of
from common.estimate.upkeep import Upkeep, checkpoint_values, upkeep, upkeep_lines, upkeep_values
from common.estimate.weights import adam_bytes
from common.model.shape.config import QwenConfig
from common.model.shape.parameters import num_parameters

GIB = 2**30
LAYOUT = ("tp", "pp", "vpp", "cp", "micro_batch_size", "recompute")
MEMORY = ("weights", "gradients", "optimizer", "activations", "buffers", "peak GiB")
REASONS_SHOWN = 3


def report(
    asked: EstimateSettings, qwen: QwenConfig, gpu: Gpu, found: Sequence[Estimate], refused: Sequence[Refusal]
) -> Iterator[str]:
    """The lines: what was asked, a row a layout, what is not shown, and what the figures stand on."""
    world, first = asked.gpus * asked.nnodes, work_of(found[0].settings, gpu.platform, qwen)
    yield (
        f"{num_parameters(qwen):,} parameters on {world} x {gpu.name} ({gpu.memory_gib:g} GiB each);"
        f" {asked.precision}, {first.transformer_impl} layers;"
        f" a step: {asked.global_batch_size} samples x {asked.seq_length} ="
        f" {asked.global_batch_size * asked.seq_length:,} tokens"
    )
    yield ""
    shown = found[: asked.rows or None]
    yield from layout_table(asked, shown)
    if len(found) == 1 and len(found[0].ranks) > 1:
        yield ""
        yield from stage_table(found[0])
    yield ""
    yield from _left_out(found, shown, refused)
    yield from upkeep_lines(upkeep(asked, qwen), _step_seconds(found[0]) if found[0].fits != "no" else None)
    yield from _notes(asked, gpu, first.masked)
    if asked.optimizer_state == "cpu":
        kept = adam_bytes(num_parameters(qwen), asked.precision, "cpu") / GIB
        yield (
            f"note: OPTIMIZER_STATE=cpu keeps {kept:,.1f} GiB in the memory of the hosts, over all nodes; it was not"
            " run on a GPU, and the rate of the link to the host is assumed"
        )


def layout_table(asked: EstimateSettings, shown: Sequence[Estimate]) -> Iterator[str]:
    """A row a layout; the memory is that of the stage that needs the most, in GiB a GPU."""
    names = ["TP", "PP", "DP", "micro-batch", "recompute", *MEMORY, "fits", "tokens/s", "days"]
    rows = []
    for one in shown:
        chosen = one.settings
        sizes = [chosen.tp, chosen.pp, chosen.sizes.dp, chosen.micro_batch_size, chosen.recompute]
        rate = f"{one.speed.tokens_per_second:,.0f}" if one.speed else "-"
        days = f"{one.speed.days(asked.tokens):.2f}" if one.speed and asked.tokens else "-"
        rows.append([*map(str, sizes), *_memory_cells(one.largest), one.fits, rate, days])
    yield from _aligned([names, *rows])


def stage_table(one: Estimate) -> Iterator[str]:
    """A row a pipeline stage, in GiB a GPU."""
    rows = [[str(rank.pp_rank), f"{rank.parameters:,}", *_memory_cells(rank)] for rank in one.ranks]
    yield from _aligned([["stage", "parameters", *MEMORY], *rows])


def _memory_cells(rank: RankMemory) -> list[str]:
    state = rank.state
    parts = (
        state.weights,
        state.gradients,
        state.optimizer,
        max(rank.activations, rank.step),
        rank.workspace,
        rank.peak,
    )
    return [f"{part / GIB:.2f}" for part in parts]


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _left_out(found: Sequence[Estimate], shown: Sequence[Estimate], refused: Sequence[Refusal]) -> Iterator[str]:
    number = Counter(one.fits for one in found)
    least = min(found, key=lambda one: one.largest.peak)
    yield (
        f"{len(found)} layout{'s' if len(found) > 1 else ''}: {number['yes']} fit, {number['tight']} are tight,"
        f" {number['no']} need more memory;"
        f" {len(shown)} shown (--rows). The least memory: {_named(least)}, {least.largest.peak / GIB:.1f} GiB"
    )
    reasons = Counter(refusal.reason for refusal in refused)
    if reasons:
        told = f", {REASONS_SHOWN} of them shown; --json has all" if len(reasons) > REASONS_SHOWN else ""
        yield f"{len(refused)} layouts are refused, for {len(reasons)} reasons{told}:"
    for reason, count in reasons.most_common(REASONS_SHOWN):
        yield f"  {count} x {reason}"


def _named(one: Estimate) -> str:
    return " ".join(f"{name.upper()}={getattr(one.settings, name)}" for name in LAYOUT)


def _step_seconds(one: Estimate) -> float | None:
    return one.speed.step_seconds if one.speed else None


def _notes(asked: EstimateSettings, gpu: Gpu, masked: bool) -> Iterator[str]:
    if not gpu.platform.ran_on_hardware:
        yield f"note: this kit was not run on {gpu.platform.name} hardware"
    if not gpu.rated:
        yield f"note: the rates of {gpu.name} are not known here, so nothing is said of speed"
    elif gpu.name not in MEASURED:
        yield f"note: speed was measured on {' and '.join(MEASURED)}; here its shares of the data sheet's rates count"
    if masked:
        yield "note: attention with a mask (PACKING) was not measured on a GPU, neither its memory nor its time"
    if asked.cp > 1:
        yield "note: context parallelism was not measured, and the time of what its ranks send is not counted"
    if gpu.rated and asked.gpus * asked.nnodes > 1:
        yield "note: speed on more than one GPU was not measured; the rates of links between GPUs are assumed"


def as_values(
    asked: EstimateSettings, qwen: QwenConfig, gpu: Gpu, found: Sequence[Estimate], refused: Sequence[Refusal]
) -> dict[str, Any]:
    """All of it for JSON; memory in bytes."""
    kept = upkeep(asked, qwen)
    return {
        "asked": asdict(asked),
        "parameters": num_parameters(qwen),
        "gpu": {"name": gpu.name, "platform": gpu.platform.name, "memory_gib": gpu.memory_gib},
        "checkpoint": checkpoint_values(kept),
        "layouts": [_values(asked, kept, one) for one in found],
        "refused": [{**refusal.layout, "reason": refusal.reason} for refusal in refused],
    }


def _values(asked: EstimateSettings, kept: Upkeep, one: Estimate) -> dict[str, Any]:
    speed = one.speed
    return {
        **{name: getattr(one.settings, name) for name in LAYOUT},
        "dp": one.settings.sizes.dp,
        "fits": one.fits,
        "peak_bytes": one.largest.peak,
        "stages": [{**asdict(rank), "peak": rank.peak} for rank in one.ranks],
        "tokens_per_s": speed and speed.tokens_per_second,
        "step_s": _step_seconds(one),
        "bubble": speed and speed.bubble,
        "days": speed.days(asked.tokens) if speed and asked.tokens else None,
        **upkeep_values(kept, _step_seconds(one)),
    }
