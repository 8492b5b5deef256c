"""Which checkpoints of a run are kept, and the removal of the others, for which nobody waits."""

import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.atomic_file import write_json
from common.checkpoint.formats.layout import iteration_dir, list_iterations
from common.log import logger
from common.training.settings import TrainSettings
from common.training.state.run_folder import RunFolder

RECORD = "kept_checkpoints.json"  # in the run's folder


@dataclass
class Record:
    """What is known of iterations beside their weights: validation losses, and those at which an epoch ended."""

    validation_losses: dict[int, float] = field(default_factory=dict)
    epoch_ends: set[int] = field(default_factory=set)

    def content(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        losses = {str(iteration): loss for iteration, loss in sorted(self.validation_losses.items())}
        return {"validation_losses": losses, "epoch_ends": sorted(self.epoch_ends)}

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record of `folder`; an empty one where there is none that can be read."""
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            losses = {int(iteration): float(loss) for iteration, loss in content["validation_losses"].items()}
            return cls(losses, {int(iteration) for iteration in content["epoch_ends"]})
        return cls()


def superfluous(iterations: list[int], current: int, settings: TrainSettings, record: Record) -> list[int]:
    """Of the checkpoints at `iterations` those that no setting keeps; never `current`, nor what is newer than it.

    A newer one is of the run's future: the tracker was set back. Whoever did so removes it.
    """
    if not settings.keep_checkpoints:
        return []
    older = sorted(iteration for iteration in iterations if iteration <= current)
    kept = {current, *older[-settings.keep_checkpoints :]}
    if settings.keep_every:
        kept |= {iteration for iteration in older if iteration % settings.keep_every == 0}
    if settings.keep_epochs:
        kept |= record.epoch_ends
    losses = record.validation_losses
    measured = sorted((iteration for iteration in older if iteration in losses), key=lambda each: losses[each])
    return [iteration for iteration in older if iteration not in kept | set(measured[: settings.keep_best])]


class Retention:
    """Keeps the record of a run and removes its superfluous checkpoints from a thread of rank 0."""

    def __init__(self, settings: TrainSettings, folder: RunFolder) -> None:
        self.settings, self.folder, self.record = settings, folder, Record.read(folder.path)
        self._thread: threading.Thread | None = None

    def write_record(self) -> None:
        """Puts the record on the disk; raises OSError."""
        write_json(self.folder.path / RECORD, self.record.content())

    def prune(self, current: int) -> None:
        """Begins to remove what is superfluous beside the checkpoint at `current`, which the tracker names."""
        self.wait()
        old = superfluous(list_iterations(self.folder.path), current, self.settings, self.record)
        self._thread = threading.Thread(target=self._remove, args=(old,), name="retention", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when all that was begun is removed."""
        if self._thread is not None:
            self._thread.join()

    def _remove(self, old: list[int]) -> None:
        removed = 0
        try:
            self.folder.remove_asides()
            for iteration in old:
                self.folder.remove(iteration_dir(self.folder.path, iteration))
                removed += 1
        except OSError as error:  # a reader on NFS, another disk's mount: the next save tries again
            logger.warning("an older checkpoint could not be removed (%s): remove it by hand", error)
        if removed:
            logger.info("removed %d older checkpoint(s): KEEP_CHECKPOINTS=%d", removed, self.settings.keep_checkpoints)
