"""Retention: which checkpoints of a run are kept. The others are removed in the background."""

import json
import threading
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.checkpoint.formats.checkpoint_paths import iteration_dir, list_iterations
from common.checkpoint.formats.model_files import KEPT
from common.files import write_json
from common.log import listed, logger
from common.training.checkpointing.run_folder import RunFolder
from common.training.settings import TrainSettings


@dataclass
class RetentionRecord:
    """What retention depends on: validation losses, and the iterations that completed an epoch.

    validation_data: hashes of what the losses are of, by the set's name; losses on other data do not compare.
    best_before: the iterations that were the best on the data before.
    """

    validation_losses: dict[int, float] = field(default_factory=dict)
    epoch_ends: set[int] = field(default_factory=set)
    validation_data: dict[str, str] = field(default_factory=dict)
    best_before: set[int] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        losses = {str(iteration): loss for iteration, loss in sorted(self.validation_losses.items())}
        return {
            "validation_losses": losses,
            "epoch_ends": sorted(self.epoch_ends),
            "validation_data": self.validation_data,
            "best_before": sorted(self.best_before),
        }

    @classmethod
    def read(cls, folder: Path) -> "RetentionRecord":
        """The record in `folder`; empty if it is missing or unreadable."""
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            content = json.loads((folder / KEPT).read_text(encoding="utf-8"))
            losses = {int(iteration): float(loss) for iteration, loss in content["validation_losses"].items()}
            return cls(
                losses,
                {int(iteration) for iteration in content["epoch_ends"]},
                # Records of older versions of the kit do not have these.
                dict(content.get("validation_data", {})),
                {int(iteration) for iteration in content.get("best_before", [])},
            )
        return cls()

    def best(self, iterations: list[int], number: int) -> set[int]:
        """The `number` of `iterations` with the lowest validation losses."""
        evaluated = sorted(iteration for iteration in iterations if iteration in self.validation_losses)
        return set(sorted(evaluated, key=self.validation_losses.__getitem__)[:number])

    def compare_on(self, validation_data: dict[str, str], iterations: list[int], number: int) -> None:
        """Sets the data of the losses from here on; if it is other data, those so far no longer compare.

        The `number` best of `iterations` on the data before stay kept. A run without validation changes nothing.
        """
        if validation_data and self.validation_data and validation_data != self.validation_data:
            best = self.best(iterations, number)
            kept = f"; their best, iterations {listed(sorted(best))}, stay kept" if best else ""
            logger.info(
                "the validation data is another than before: the %d losses so far do not compare%s",
                len(self.validation_losses), kept,
            )  # fmt: skip
            self.best_before |= best
            self.validation_losses.clear()
        self.validation_data = validation_data or self.validation_data


def checkpoints_to_remove(
    iterations: list[int], current: int, settings: TrainSettings, record: RetentionRecord
) -> list[int]:
    """Those of `iterations` that no setting keeps; never `current` or a newer one.

    A newer one exists after the tracker was set back; removing it is left to the user who did so.
    """
    if not settings.keep_checkpoints:
        return []
    older = sorted(iteration for iteration in iterations if iteration <= current)
    kept = {current, *older[-settings.keep_checkpoints :]}
    if settings.keep_every:
        kept |= {iteration for iteration in older if iteration % settings.keep_every == 0}
    if settings.keep_epochs:
        kept |= record.epoch_ends
    if settings.keep_best:
        kept |= record.best(older, settings.keep_best) | record.best_before
    return [iteration for iteration in older if iteration not in kept]


class Retention:
    """Keeps a run's retention record, and removes checkpoints in a thread of rank 0."""

    def __init__(
        self, settings: TrainSettings, folder: RunFolder, validation_data: dict[str, str] | None = None
    ) -> None:
        self.settings, self.folder, self.record = settings, folder, RetentionRecord.read(folder.path)
        self.record.compare_on(validation_data or {}, list_iterations(folder.path), settings.keep_best)
        self._thread: threading.Thread | None = None

    def write_record(self) -> None:
        """Writes the record to disk; raises OSError."""
        write_json(self.folder.path / KEPT, self.record.to_json())

    def prune(self, current: int, needed: Collection[int] = ()) -> None:
        """Starts to remove what no setting keeps; `current` is the checkpoint that the tracker names.

        needed: iterations that are kept this time.
        """
        self.wait()
        old = checkpoints_to_remove(list_iterations(self.folder.path), current, self.settings, self.record)
        old = [iteration for iteration in old if iteration not in needed]
        self._thread = threading.Thread(target=self._remove, args=(old,), name="retention", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Blocks until the removal in progress is done."""
        if self._thread is not None:
            self._thread.join()

    def _remove(self, old: list[int]) -> None:
        removed = 0
        try:
            self.folder.remove_replaced()
            for iteration in old:
                self.folder.remove(iteration_dir(self.folder.path, iteration))
                removed += 1
        except OSError as error:  # a reader on NFS, another disk's mount: the next save tries again
            logger.warning("could not remove an older checkpoint (%s): remove it by hand", error)
        if removed:
            logger.info("removed %d older checkpoint(s): KEEP_CHECKPOINTS=%d", removed, self.settings.keep_checkpoints)
