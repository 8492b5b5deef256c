"""The reference of preference training: which weights it has, and the files that hold its log-probabilities.

A dataset's file lies beside it, or in SAVE_CHECKPOINT_PATH where that folder cannot be written. It holds "facts", all
that its values depend on, as JSON, and "log_probs", float32 [pairs, 2]: of the chosen and the rejected answer, UNKNOWN
for pairs that no run has needed yet. Its name has a hash of the facts, so that several references can lie side by side.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint.formats.checkpoint_paths import Checkpoint, find_checkpoint
from common.checkpoint.formats.common_state import run_metadata
from common.checkpoint.formats.identity import weights_hash
from common.checkpoint.verification.pickle_scan import check_pickles
from common.data.dataset.manifest import hash_json
from common.data.dataset.preference_dataset import PreferenceDataset, preference_datasets
from common.errors import KitError, describe_os_error
from common.files import write_atomically
from common.log import logger
from common.parallel import is_node_leader
from common.training.settings import TrainSettings

VERSION = 1
WEIGHTS_HASH = "KIT_WEIGHTS_HASH"  # in a rank's environment: the hash, and the folder that it is of
UNKNOWN = -np.inf  # not a log-probability that can be trained on
NAMES = "*.reference_*.npz"


def reference_hash(settings: TrainSettings, kind: str, checkpoint: Checkpoint | None) -> str:
    """What identifies the weights that a run's answers are compared with; "" where they are compared with none.

    kind, checkpoint: where the run starts, see Start. A run that resumes keeps the reference that it began with. Raises
    KitError where there are no such weights, or other ones than it began with.
    """
    if settings.train_mode != "dpo" or settings.dpo_loss == "orpo" or settings.train_or_convert_ckpt != "train":
        return ""
    if checkpoint is None:
        raise KitError(
            f"DPO_LOSS={settings.dpo_loss} compares the model with the weights that it starts from, and random ones"
            " prefer nothing: set LOAD_CHECKPOINT_PATH to a fine-tuned model, or DPO_LOSS=orpo"
        )
    if kind == "weights":
        return _weights_hash(checkpoint.path)
    recorded = str((run_metadata(checkpoint).get("data") or {}).get("reference", ""))
    given = reference_checkpoint(settings)
    if given and recorded and _weights_hash(given.path) != recorded:
        raise KitError(
            f"LOAD_CHECKPOINT_PATH={settings.load_checkpoint_path} is now {given.path}, whose weights are not"
            f" those that the run in {checkpoint.folder} began with and compares its answers with: set it to that"
            " checkpoint, or start a new SAVE_CHECKPOINT_PATH"
        )
    return recorded or (_weights_hash(given.path) if given else "")


def _weights_hash(path: Path) -> str:
    """As weights_hash; a rank takes it from its launcher, since hundreds of ranks would read hundreds of files each."""
    found, _, of = os.environ.get(WEIGHTS_HASH, "").partition(" ")
    if of != str(path.absolute()):
        found = weights_hash(path)
        os.environ[WEIGHTS_HASH] = f"{found} {path.absolute()}"
    return found


def reference_checkpoint(settings: TrainSettings) -> Checkpoint | None:
    """The checkpoint in LOAD_CHECKPOINT_PATH; None where that is not set, or is there no longer."""
    path = settings.load_checkpoint_path
    return find_checkpoint(Path(path)) if path and Path(path).is_dir() else None


@dataclass(frozen=True)
class Reference:
    """The log-probabilities of the datasets that share a file: the same data, truncated alike; see the module.

    paths: where the file may lie, the first one preferred.
    """

    datasets: list[PreferenceDataset]
    facts: dict[str, Any]
    paths: tuple[Path, Path]

    @property
    def num_pairs(self) -> int:
        """The pairs of the data, also those that no dataset uses."""
        return self.datasets[0].num_pairs

    def read(self) -> np.ndarray:
        """float32 [pairs, 2]: what is stored; UNKNOWN where nothing is."""
        for path in self.paths:
            if (found := _read(path, self.facts)) is not None and found.shape == (self.num_pairs, 2):
                return found
        return np.full((self.num_pairs, 2), UNKNOWN, np.float32)

    def write(self, log_probs: np.ndarray) -> None:
        """Stores `log_probs`, float32 [pairs, 2]; raises OSError where neither folder can be written."""
        buffer = io.BytesIO()
        np.savez(buffer, facts=np.array(json.dumps(self.facts)), log_probs=log_probs)
        beside, other = self.paths
        try:
            write_atomically(beside, buffer.getvalue())
            logger.info("wrote %s", beside)
        except OSError as error:
            logger.info("%s cannot be written (%s): writing %s", beside, describe_os_error(error), other)
            other.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(other, buffer.getvalue())

    def is_complete(self, log_probs: np.ndarray) -> bool:
        """Whether `log_probs` has those of every pair that is used."""
        return all(np.isfinite(log_probs[dataset.pair_index.pairs]).all() for dataset in self.datasets)


def references_of(settings: TrainSettings, weights: str, samples: Iterable[Any]) -> list[Reference]:
    """The references of the preference data in `samples`, in an order that is the same on every rank.

    weights: what `reference_hash` gave.
    """
    found: dict[str, Reference] = {}
    for dataset in preference_datasets(samples):
        facts = {
            "version": VERSION,
            "data": dataset.identity,
            "weights": weights,
            "truncation": dataset.pair_index.truncation,
            "precision": settings.precision,
            "fp8_format": settings.fp8_format,
        }
        prefix = dataset.tokens.prefix
        name = f"{prefix.name.removesuffix('_text_document')}.reference_{hash_json(facts)[:12]}.npz"
        paths = (prefix.with_name(name), Path(settings.save_checkpoint_path) / name)
        found.setdefault(f"{paths[0]}", Reference([], facts, paths)).datasets.append(dataset)
    return list(found.values())


def check_references(settings: TrainSettings, weights: str, samples: Iterable[Any], start: Checkpoint | None) -> None:
    """Raises KitError where a log-probability is missing, and the weights that would give it are too, or are damaged.

    start: the checkpoint that the run starts from, which is checked elsewhere.
    """
    if not weights or not start:
        return
    given = reference_checkpoint(settings)
    if given and given.path == start.path:
        return
    for reference in references_of(settings, weights, samples):
        if reference.is_complete(reference.read()):
            continue
        if given is None:
            raise KitError(
                f"{reference.paths[0]}, the log-probabilities of the weights that the run began with, is missing or"
                " incomplete: set LOAD_CHECKPOINT_PATH to those weights, and they are computed again"
            )
        if is_node_leader():
            check_pickles(given)
        return


def _read(path: Path, facts: dict[str, Any]) -> np.ndarray | None:
    """The log-probabilities in `path`; None where there is no file, or one that cannot be used, which is logged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found, log_probs = json.loads(str(file["facts"])), file["log_probs"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged and not used: %s", path, error)
        return None
    if found != facts or log_probs.dtype != np.float32:
        different = sorted(name for name in facts if not isinstance(found, dict) or found.get(name) != facts[name])
        logger.warning("%s is of other %s and not used", path, ", ".join(different) or "values")
        return None
    values: np.ndarray = log_probs
    return values
