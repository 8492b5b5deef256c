"""What must be the same on every node of a run: named facts, and how they differ between two nodes."""

import platform as python_platform
import socket
from dataclasses import fields
from fractions import Fraction
from importlib import metadata

from common.data.dataset.blended_dataset import read_blend
from common.data.dataset.file_hash import DATA_SAMPLES, HASHED, hash_file, hash_samples
from common.data.dataset.indexed_dataset import bin_path, idx_path
from common.data.dataset.manifest import DataFiles
from common.data.dataset.named_datasets import read_named
from common.settings import KIT
from common.training.planning.plan import Plan, Start

Facts = dict[str, str]

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "transformers", "numpy")
# Settings of one node. A folder may have another path on each node, so its contents are compared instead.
NOT_COMPARED = (
    "node_rank", "master_addr", "rdzv_endpoint", "wandb_save_path", "save_checkpoint_path", "load_checkpoint_path",
    "hf_model_path", "dataset_path", "valid_dataset_path",
)  # fmt: skip
WEIGHT_SAMPLES = 16
SHOWN_DIFFERENCES = 5


def node_name(number: int | None = None) -> str:
    """This node in messages: `node 1 (host)`, or the host alone at a rendezvous, which numbers the nodes itself."""
    host = socket.gethostname()
    return host if number is None else f"node {number} ({host})"


def facts_of(plan: Plan) -> Facts:
    """Facts on the settings, package versions, the kit's code, the model's config and tokenizer, and the data."""
    settings = plan.settings
    shared = {field.name.upper(): str(getattr(settings, field.name)) for field in fields(settings)}
    for name in NOT_COMPARED:
        del shared[name.upper()]
    model = {name: plan.start.model_folder / name for name in ("config.json", "tokenizer.json")}
    return {
        **shared,
        "KIT_PLATFORM": plan.platform.name,
        **versions(),
        **{str(path.relative_to(KIT)): hash_file(path) for path in sorted((KIT / "common").rglob("*.py"))},
        **{f"the model's {name}": hash_file(path) for name, path in model.items() if path.is_file()},
        **(data_facts("DATASET_PATH", settings.dataset_path) if plan.train else {}),
        **(data_facts("VALID_DATASET_PATH", settings.valid_dataset_path) if plan.train else {}),
    }


def versions() -> Facts:
    """Versions of Python and of the installed PACKAGES, on which a run's results depend."""
    found = {"Python": ".".join(python_platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def data_facts(setting: str, text: str | None) -> Facts:
    """The weight and file hashes of each dataset in `text`: an index is hashed whole, tokens by samples.

    Datasets are told apart by their names, or by their number where they have none.
    """
    found: Facts = {}
    for key, (weight, files) in _datasets(setting, text).items() if text else ():
        where = f"{setting}[{key}]"
        found[f"{where}'s weight"] = str(weight)
        for prefix in filter(None, (files.tokens, files.loss_mask)):
            found[f"{where} {idx_path(prefix).name}"] = hash_file(idx_path(prefix))
            found[f"{where} {bin_path(prefix).name}"] = hash_samples(bin_path(prefix), DATA_SAMPLES)
    return found


def _datasets(setting: str, text: str) -> dict[str, tuple[Fraction, DataFiles]]:
    if named := read_named(text, setting):
        return {name: (Fraction(1), files) for name, files in named.items()}
    return {str(number): each for number, each in enumerate(read_blend(text, setting))}


def start_facts(start: Start) -> Facts:
    """How a run starts, and the checkpoint files it reads: names, and hashes of size and sampled bytes."""
    if start.checkpoint is None:
        return {"start": start.kind}
    path = start.checkpoint.path
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        "start": f"{start.kind} from {path.name}",
        **{f"{path.name}/{file.relative_to(path)}": hash_samples(file, WEIGHT_SAMPLES) for file in files},
    }


def differences(reference: Facts, there: str, own_facts: Facts, here: str) -> str:
    """How the facts of node `here` differ from those of node `there`, as text; empty if they do not."""
    found = []
    for name in dict.fromkeys((*reference, *own_facts)):
        theirs, own = reference.get(name), own_facts.get(name)
        if theirs == own:
            continue
        if theirs is None or own is None:
            found.append(f"{name} exists only on {here if theirs is None else there}")
        elif own.startswith(HASHED):
            found.append(f"{name} differs")
        else:
            found.append(f"{name} is {own} on {here}, {theirs} on {there}")
    more = f", and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
    return f"{', '.join(found[:SHOWN_DIFFERENCES])}{more}" if found else ""
