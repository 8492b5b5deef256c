"""The curves of runs as SVG or PNG, drawn by matplotlib."""

import io
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from common.errors import KitError, writing
from common.report.runs import Points, Run, smooth, smoothing, thin

References = dict[str, float]  # losses by name, drawn as lines


@dataclass(frozen=True)
class Panel:
    """A plot of one metric. scale: linear, log, or zero (linear from 0 on)."""

    title: str
    metric: str
    label: str
    scale: str
    smoothed: bool = True


PANELS = (
    Panel("Loss", "loss", "nats per token", "linear"),
    Panel("Accuracy", "accuracy", "share of pairs", "zero"),
    Panel("Reward margin", "reward_margin", "chosen less rejected", "linear"),
    Panel("Gradient norm", "grad_norm", "before clipping", "log"),
    Panel("Learning rate", "learning_rate", "", "linear", smoothed=False),
    Panel("Throughput", "tokens_per_s", "tokens/s", "zero"),
    Panel("Padding", "padding", "share of positions", "zero", smoothed=False),
    Panel("Memory", "memory_gib", "GiB, fullest rank", "zero", smoothed=False),
)
MARKERS = "os^vDPX*"  # of the validation curves of a run, which share its color
COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#475569")


def panels(runs: list[Run]) -> list[Panel]:
    """Those whose metric some run has; the loss is first."""
    return [panel for panel in PANELS if any(run.curve(panel.metric) for run in runs)]


def figure(width: float, height: float) -> Any:
    """A matplotlib Figure, in inches; raises KitError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise KitError("the report's curves need matplotlib: pip install -r requirements/plots.txt") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_panel(axes: Any, panel: Panel, runs: list[Run], references: References) -> None:
    """Draws the curves of `runs` on a matplotlib Axes, in the loss also `references`."""
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel="iteration", ylabel=panel.label)
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        _draw_curve(axes, run, panel, color, f"{run.name}: " if len(runs) > 1 else "")
    axes.locator_params(axis="x", nbins=5)
    if panel.scale == "zero":
        axes.set_ylim(0, 1.1 * max(value for run in runs for _, value in run.curve(panel.metric)) or 1)
    elif panel.scale == "log" and all(value > 0 for run in runs for _, value in run.curve(panel.metric)):
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if panel.metric == "loss":
        for (name, loss), style in zip(references.items(), cycle(("-.", ":", "--")), strict=False):
            axes.axhline(loss, color="#6b7280", linestyle=style, linewidth=1.2, label=f"{name}: {loss:.3g}")
        axes.legend(frameon=False)


def _draw_curve(axes: Any, run: Run, panel: Panel, color: str, prefix: str) -> None:
    """One run's values, pale under their moving average where there are enough; of the loss also validation's."""
    points = run.curve(panel.metric)
    if not points:
        return
    smoothed = panel.smoothed and smoothing(len(points)) > 0
    if smoothed:
        axes.plot(*_columns(thin(points)), color=color, alpha=0.3, linewidth=1)
    curve, label = (smooth(points), "training, smoothed") if smoothed else (points, "training")
    axes.plot(*_columns(thin(curve)), color=color, linewidth=1.8, label=f"{prefix}{label}")
    if panel.metric == "loss":
        for (name, metric), marker in zip(run.validation_metrics.items(), cycle(MARKERS), strict=False):
            style = {"linestyle": ":" if name else "--", "marker": marker, "markersize": 4}
            label = f"{prefix}validation" + f", {name}" * bool(name)
            axes.plot(*_columns(run.curve(metric)), color=color, label=label, **style)


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [iteration for iteration, _ in points], [value for _, value in points]


def as_svg(runs: list[Run], references: References) -> list[str]:
    """An <svg> element per panel, that scales with the page."""
    found = []
    for panel in panels(runs):
        drawn, buffer = figure(7.0 if panel.metric == "loss" else 4.5, 3.0), io.StringIO()
        draw_panel(drawn.subplots(), panel, runs, references)
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
        found.append("<svg" + buffer.getvalue().split("<svg", 1)[1])
    return found


def write_png(runs: list[Run], path: Path, references: References) -> None:
    """Writes all panels to `path` as one PNG: the loss above, the others in two columns."""
    first, *others = panels(runs)
    rows = 1 + (len(others) + 1) // 2
    drawn = figure(9.0, 3.0 * rows)
    grid = drawn.add_gridspec(rows, 2)
    draw_panel(drawn.add_subplot(grid[0, :]), first, runs, references)
    for number, panel in enumerate(others):
        draw_panel(drawn.add_subplot(grid[1 + number // 2, number % 2]), panel, runs, references)
    with writing(path):
        drawn.savefig(path, format="png", dpi=150)
