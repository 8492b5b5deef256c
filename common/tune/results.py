"""The trials as a table, and the fastest layout as a settings file for step 3."""

import time
from collections.abc import Iterator, Sequence

from common.estimate.gpus import Gpu
from common.estimate.layouts import Estimate
from common.estimate.settings_file import layout_lines
from common.tune.trial import Trial

GIB = 2**30
SEARCHED = ("vpp", "cp", "recompute")  # the script's own values may not be the defaults
NAMES = ("micro-batch", "recompute", "estimated: tokens/s", "GiB", "measured: tokens/s", "GiB", "")


def table(tried: Sequence[tuple[Estimate, Trial]]) -> Iterator[str]:
    """A line per layout, the fastest first; those that failed last, with the reason.

    With CP where one is above 1, with PIPELINE_LAYERS where one has them.
    """
    context = any(one.settings.cp > 1 for one, _ in tried)
    uneven = any(one.settings.pipeline_layers for one, _ in tried)
    rows = [["TP", "PP", "VPP", *["PIPELINE_LAYERS"] * uneven, *["CP"] * context, *NAMES]]
    for one, trial in sorted(tried, key=lambda each: -each[1].tokens_per_s):
        layout = one.settings
        sizes = [layout.tp, layout.pp, layout.vpp, *[layout.pipeline_layers or "even"] * uneven]
        sizes += [*[layout.cp] * context, layout.micro_batch_size, layout.recompute]
        said = [f"{one.speed.tokens_per_second:,.0f}" if one.speed else "-", f"{one.largest.peak / GIB:.1f}"]
        found = [f"{trial.tokens_per_s:,.0f}" if trial.tokens_per_s else "-"]
        found += [f"{trial.memory_gib:.1f}" if trial.memory_gib else "-"]
        rows.append([*map(str, sizes), *said, *found, trial.reason])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]]).rstrip()


def settings_lines(one: Estimate, trial: Trial, gpu: Gpu, iterations: int) -> Iterator[str]:
    """The lines of a file for SETTINGS."""
    number = one.settings.gpus
    yield f"# Tried on {number} x {gpu.name} on {time.strftime('%Y-%m-%d')}, {iterations} steps: the fastest layout,"
    memory = f", {trial.memory_gib:.1f} GiB on the fullest GPU" if trial.memory_gib else ""
    yield f"# {trial.tokens_per_s:,.0f} tokens/s{memory}."
    yield from layout_lines(one.settings, SEARCHED)
