"""The results as a table and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from common.evaluate.loss import Loss
from common.evaluate.samples import RowSet
from common.evaluate.tasks import TaskScore

ALL = "all"


@dataclass(frozen=True)
class RowScore:
    """The loss on one row set."""

    row_set: RowSet
    loss: Loss

    def to_json(self) -> dict[str, Any]:
        """The fields of the score; a perplexity that is infinite is None."""
        return {
            "name": self.row_set.name,
            "files": list(map(str, self.row_set.files)),
            "format": self.row_set.format,
            "rows": self.row_set.rows,
            "windows": len(self.row_set.windows),
            "seq_length": self.row_set.seq_length,
            "stride": self.row_set.stride,
            "tokens": sum(window.weights.size for window in self.row_set.windows),
            **loss_json(self.loss),
            "counts": {what: number for what, number in self.row_set.counts.items() if number},
        }


def loss_json(loss: Loss) -> dict[str, Any]:
    """Supervised tokens, their weights' sum, loss and perplexity."""
    perplexity = loss.perplexity if isfinite(loss.perplexity) else None
    return {"supervised_tokens": loss.tokens, "weight": loss.weight, "loss": loss.mean, "perplexity": perplexity}


def results_json(scores: Sequence[RowScore], tasks: Sequence[TaskScore]) -> dict[str, Any]:
    """All results; "all" is the mean over the supervised tokens of all row sets."""
    content: dict[str, Any] = {"rows": [score.to_json() for score in scores], "tasks": [asdict(task) for task in tasks]}
    if scores:
        content[ALL] = loss_json(total(scores))
    return content


def total(scores: Sequence[RowScore]) -> Loss:
    """The sums over `scores`."""
    return sum((score.loss for score in scores), Loss())


def table(scores: Sequence[RowScore], tasks: Sequence[TaskScore]) -> list[str]:
    """The lines of the table: one for each row set, all of them together where there are several, and each task."""
    rows = [(s.row_set.name, str(s.row_set.rows), str(len(s.row_set.windows)), *_cells(s.loss)) for s in scores]
    if len(scores) > 1:
        rows.append((ALL, str(sum(s.row_set.rows for s in scores)), "", *_cells(total(scores))))
    lines = _aligned([("rows of", "rows", "windows", "supervised", "loss", "perplexity"), *rows]) if rows else []
    if tasks:
        cells = [
            (t.task, str(t.num_fewshot), str(t.samples), t.metric, f"{t.value:.4f}", _stderr(t.stderr)) for t in tasks
        ]
        heading = ("task", "shots", "samples", "metric", "value", "stderr")
        lines += [*([""] if lines else []), *_aligned([heading, *cells])]
    return lines


def _cells(loss: Loss) -> tuple[str, str, str]:
    return str(loss.tokens), f"{loss.mean:.6f}", f"{loss.perplexity:.4f}"


def _stderr(stderr: float | None) -> str:
    return "" if stderr is None else f"{stderr:.4f}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ("<", *">" * (len(widths) - 1))
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [line.format(*row).rstrip() for row in rows]
