"""`python -m common.watch RUN`: a live view of a run, from another terminal or node, from the records in its folder."""

import argparse
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from common import errors
from common.report.runs import Points, Run, best_validation, end_reason, latest, read_run, smooth, thin
from common.training.loop.metrics import clock

BLOCKS = "▁▂▃▄▅▆▇█"
PACE_LINES = 20  # the time left follows from the pace of so many log lines, with their evaluations and saves


def main() -> None:
    """Shows the run until it ends or Ctrl-C; exits 2 if the folder holds no metrics."""
    parser = argparse.ArgumentParser(prog="python -m common.watch", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's SAVE_CHECKPOINT_PATH")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between looks (default: %(default)g)")
    parser.add_argument("--once", action="store_true", help="print the view once")
    arguments = parser.parse_args()
    console, run = Console(), read_run(arguments.run)
    if arguments.once:
        console.print(view(run, console.width, time.time()))
        return
    with (
        suppress(KeyboardInterrupt),
        Live(view(run, console.width, time.time()), console=console, auto_refresh=False) as live,
    ):
        while end_reason(run) is None:
            time.sleep(arguments.interval)
            run = read_run(arguments.run)
            live.update(view(run, console.width, time.time()), refresh=True)


def view(run: Run, width: int, now: float) -> RenderableType:
    """A panel: progress and time left, the loss with its curve, the newest metrics. now: seconds since 1970."""
    trained = [line for line in run.lines if "loss" in line] or run.lines
    last, total = trained[-1], run.starts[-1]["train_iters"] if run.starts else None
    state = end_reason(run) or f"last line {max(0.0, now - run.lines[-1]['time']):.0f} s ago"
    progress = f"iteration {last['iteration']:,}" + (
        f" of {total:,}, {time_left(trained, total)} left" if total else ""
    )
    rows: list[RenderableType] = [progress]
    if total:
        bar = Table.grid()
        bar.add_row(ProgressBar(total=total, completed=last["iteration"], width=width - 4))
        rows.append(bar)
    losses = run.curve("loss")
    if losses:
        rows += [f"loss {latest(losses):.4f}", sparkline(smooth(losses), width - 4)]
    for name, metric in run.validation_metrics.items():
        if curve := run.curve(metric):
            label = "validation loss" + f", {name}" * bool(name)
            rows.append(f"{label} {curve[-1][1]:.4f}, best {best_validation(run, metric)}")
    names = {
        "accuracy": "accuracy {:.1%}", "reward_margin": "margin {:.2f}", "grad_norm": "grad norm {:.4f}",
        "learning_rate": "lr {:.3e}", "tokens_per_s": "{:,.0f} tokens/s",
        "tflops_per_gpu": "{:#.3g} TFLOP/s/GPU", "memory_gib": "{:.1f} GiB at most",
    }  # fmt: skip
    shown = [text.format(last[name]) for name, text in names.items() if isinstance(last.get(name), int | float)]
    return Panel(Group(*rows, " | ".join(shown)), title=run.name, subtitle=state, width=width)


def time_left(trained: list[dict[str, float]], total: int) -> str:
    """The time until iteration `total` at the pace of the last lines, as 1:02:03; ? before there are two."""
    first, last = trained[-PACE_LINES:][0], trained[-1]
    if first is last or last["iteration"] <= first["iteration"]:
        return "?"
    seconds = (last["time"] - first["time"]) / (last["iteration"] - first["iteration"])
    return clock(seconds * (total - last["iteration"]))


def sparkline(points: Points, width: int) -> str:
    """The values of `points` as a line of at most `width` blocks, the lowest value as the lowest block."""
    values = [value for _, value in thin(points, max(1, width))]
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


if __name__ == "__main__":
    errors.run(main)
