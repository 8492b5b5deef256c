"""The lowest validation losses of a run so far, over all of its starts that evaluated the same data."""

from contextlib import suppress
from pathlib import Path

from common.training.planning.plan import Plan
from common.training.tracking.records import VALIDATION_LOSS, read_metrics, read_run_record


def metric_of(name: str, metric: str = VALIDATION_LOSS) -> str:
    """The metric of the validation set `name`; "" is all of them."""
    return f"{metric}/{name}" if name else metric


class BestLosses:
    """The lowest loss of each validation set, read from the run's records on rank 0; the others know of none."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._lowest: dict[str, float] = {}
        folder = Path(plan.settings.save_checkpoint_path)
        if rank or not plan.valid_hashes:
            return
        starts = read_run_record(folder)["starts"]
        with suppress(OSError):  # the first start
            for line in read_metrics(folder):
                if line["iteration"] > plan.progress.iteration or line["start"] >= len(starts):
                    continue
                hashes = starts[line["start"]].get("validation") or {}
                same = {name for name, found in plan.valid_hashes.items() if hashes.get(name) == found}
                same |= {""} if hashes == plan.valid_hashes else set()
                losses = {name: line.get(metric_of(name)) for name in same}
                self.update({name: loss for name, loss in losses.items() if isinstance(loss, int | float)})

    def update(self, losses: dict[str, float]) -> set[str]:
        """The names of those of `losses` that are the lowest so far, which they become."""
        lower = {name: loss for name, loss in losses.items() if loss < self._lowest.get(name, float("inf"))}
        self._lowest |= lower
        return set(lower)
