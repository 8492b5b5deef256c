"""An estimate as a table, or as plain values for JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from common.estimate.activations import Workload
from common.estimate.balance import REASON
from common.estimate.gpus import ASSUMED, MEASURED, Gpu
from common.estimate.layouts import Estimate, EstimateSettings, Refusal, balanced, without_needless_context
from common.estimate.memory import RankMemory
from common.estimate.upkeep import Upkeep, checkpoint_values, upkeep, upkeep_lines, upkeep_values
from common.estimate.weights import adam_bytes
from common.model.shape.config import QwenConfig
from common.model.shape.parameters import num_parameters
from common.training.settings.optimizer import OFFLOADED

GIB = 2**30
LAYOUT = ("tp", "pp", "vpp", "cp", "micro_batch_size", "recompute")
MEMORY = ("weights", "gradients", "optimizer", "activations", "buffers", "peak GiB")
REASONS_SHOWN = 3


def report(
    settings: EstimateSettings, qwen: QwenConfig, gpu: Gpu, found: Sequence[Estimate], refused: Sequence[Refusal]
) -> Iterator[str]:
    """The lines: the settings, one row per layout, a summary of the others, checkpoints, and notes."""
    world = settings.gpus * settings.nnodes
    shown = without_needless_context(found)[: settings.rows] if settings.rows else found
    works = [one.work for one in shown]
    first = works[0]
    yield (
        f"{num_parameters(qwen):,} parameters on {world} x {gpu.name} ({gpu.memory_gib:g} GiB each);"
        f" {settings.precision}{f' with FP8 ({first.fp8_recipe})' if first.fp8_recipe else ''},"
        f" {first.transformer_impl} layers;"
        f" a step: {settings.global_batch_size} samples x {settings.seq_length} ="
        f" {settings.global_batch_size * settings.seq_length:,} tokens"
    )
    yield ""
    yield from layout_table(settings, shown, context=any(one.settings.cp > 1 for one in found))
    if len(found) == 1 and len(found[0].ranks) > 1:
        yield ""
        yield from stage_table(found[0])
    yield ""
    yield from _left_out(found, shown, refused)
    yield from _layers(found[0], qwen, gpu)
    yield from upkeep_lines(upkeep(settings, qwen), _step_seconds(found[0]) if found[0].fits != "no" else None)
    yield from _notes(settings, gpu, works)
    if settings.optimizer_state in OFFLOADED:
        kept = adam_bytes(num_parameters(qwen), settings.precision, settings.optimizer_state) / GIB
        yield (
            f"note: OPTIMIZER_STATE={settings.optimizer_state} keeps {kept:,.1f} GiB in the memory of the hosts, over"
            " all nodes; copies are timed at the bandwidth that one H200 reached"
        )


def layout_table(settings: EstimateSettings, shown: Sequence[Estimate], *, context: bool) -> Iterator[str]:
    """One row per layout, with CP if `context`; the memory is that of the stage that needs the most, in GiB per GPU."""
    names = ["TP", "PP", "VPP", *["CP"] * context, "DP", "micro-batch", "recompute"]
    names += [*MEMORY, "fits", "tokens/s", "days"]
    rows = []
    for one in shown:
        layout = one.settings
        sizes = [layout.tp, layout.pp, layout.vpp, *[layout.cp] * context, layout.sizes.dp, layout.micro_batch_size]
        rate = f"{one.speed.tokens_per_second:,.0f}" if one.speed else "-"
        days = f"{one.speed.days(settings.tokens):.2f}" if one.speed and settings.tokens else "-"
        rows.append([*map(str, sizes), layout.recompute, *_memory_cells(one.largest), one.fits, rate, days])
    layers = [one.settings.pipeline_layers or "" for one in shown]  # last, since they may be long
    named = ["PIPELINE_LAYERS" if any(layers) else "", *layers]
    for line, each in zip(_aligned([names, *rows]), named, strict=True):
        yield f"{line}  {each}".rstrip()


def stage_table(one: Estimate) -> Iterator[str]:
    """One row per pipeline stage, in GiB per GPU."""
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
    needless = len(found) - len(without_needless_context(found))
    if needless and len(shown) < len(found):
        yield (
            f"{needless} of them are left out of the table: half of their CP and of their micro-batch is as many tokens"
            " on a GPU, and less to exchange"
        )
    reasons = Counter(refusal.reason for refusal in refused)
    if reasons:
        more = f", {REASONS_SHOWN} of them shown; --json has all" if len(reasons) > REASONS_SHOWN else ""
        yield f"{len(refused)} layouts are refused, for {len(reasons)} reasons{more}:"
    for reason, count in reasons.most_common(REASONS_SHOWN):
        yield f"  {count} x {reason}"


def _layers(first: Estimate, qwen: QwenConfig, gpu: Gpu) -> Iterator[str]:
    """PIPELINE_LAYERS with which the first layout is faster, and by how much; nothing if it has some or none are."""
    if first.settings.pipeline_layers:
        return
    faster = balanced(first, qwen, gpu)
    if faster:
        gain = first.rank_seconds / faster.rank_seconds - 1
        yield (
            f"PIPELINE_LAYERS={faster.settings.pipeline_layers}: {gain:.0%} faster, {REASON};"
            f" {faster.largest.peak / GIB:.2f} GiB per GPU"
        )


def _named(one: Estimate) -> str:
    names = (*LAYOUT, "pipeline_layers") if one.settings.pipeline_layers else LAYOUT
    return " ".join(f"{name.upper()}={getattr(one.settings, name)}" for name in names)


def _step_seconds(one: Estimate) -> float | None:
    return one.speed.step_seconds if one.speed else None


def _notes(settings: EstimateSettings, gpu: Gpu, works: Sequence[Workload]) -> Iterator[str]:
    if not gpu.platform.ran_on_hardware:
        yield f"note: this kit was not run on {gpu.platform.name} hardware"
    if not gpu.rated:
        yield (
            f"note: the rates of {gpu.name} are not known here, so speed is not estimated; layouts are in the order"
            f" that {ASSUMED}'s rates give"
        )
    elif gpu.name not in MEASURED:
        yield f"note: speed was measured on {' and '.join(MEASURED)}; here the same efficiency is assumed"
    if any(work.separate and not work.thd for work in works):
        yield "note: the kit's own attention within samples (PACKING) was not measured on a GPU: memory nor time"
    if settings.fp8_format != "none":
        yield (
            "note: FP8 was measured at 3B and 7B on one H200; the same share of bf16's time is assumed for other sizes"
        )
    divided = [work for work in works if work.cp > 1]
    if divided:
        ring, gathered = "not counted, as if all of it overlapped", "counted as if nothing overlapped it"
        time = gathered if divided[0].gathered else ring
        measured = "measured at CP=2, one document a row"
        yield f"note: context parallelism was {measured}; the time of its communication is {time}"
    if any(work.exchanging and work.tp > 2 for work in works):
        yield "note: what tensor parallelism hides of its communication was measured at TP=2"
    if gpu.rated and settings.nnodes > 1:
        yield "note: speed on several nodes was not measured; the bandwidth of links between GPUs and nodes is assumed"
    elif gpu.rated and settings.gpus > 1:
        yield "note: on up to four H200 of a host speed was within 20% of this; the bandwidth of links is assumed"


def as_values(
    settings: EstimateSettings, qwen: QwenConfig, gpu: Gpu, found: Sequence[Estimate], refused: Sequence[Refusal]
) -> dict[str, Any]:
    """The estimate as plain values for JSON, memory in bytes."""
    kept = upkeep(settings, qwen)
    return {
        "settings": asdict(settings),
        "parameters": num_parameters(qwen),
        "gpu": {"name": gpu.name, "platform": gpu.platform.name, "memory_gib": gpu.memory_gib},
        "checkpoint": checkpoint_values(kept),
        "layouts": [_values(settings, kept, one) for one in found],
        "refused": [{**refusal.layout, "reason": refusal.reason} for refusal in refused],
    }


def _values(settings: EstimateSettings, kept: Upkeep, one: Estimate) -> dict[str, Any]:
    speed = one.speed
    return {
        **{name: getattr(one.settings, name) for name in LAYOUT},
        "pipeline_layers": one.settings.pipeline_layers,
        "dp": one.settings.sizes.dp,
        "fits": one.fits,
        "peak_bytes": one.largest.peak,
        "stages": [{**asdict(rank), "peak": rank.peak} for rank in one.ranks],
        "tokens_per_s": speed and speed.tokens_per_second,
        "step_s": _step_seconds(one),
        "bubble": speed and speed.bubble,
        "days": speed.days(settings.tokens) if speed and settings.tokens else None,
        **upkeep_values(kept, _step_seconds(one)),
    }
