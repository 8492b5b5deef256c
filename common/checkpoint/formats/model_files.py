"""The files of a model beside its weights: all that lies in its folder travels with it, but for what is named here."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, RELEASE, TRACKER
from common.log import logger

REPORT = "conversion_report.json"
MAX_FILE_BYTES = 64 << 20  # the largest tokenizers have 20 MB
MAX_FOLDER_FILES = 1000
WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf",
    "*.ggml", "*.h5", "*.msgpack", "*.npz", "*.npy", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.tflite", "*.pkl",
    "*.pickle", "*.distcp", "*.engine", "*.mlmodel", "*.ot", "*.nemo", "*.llamafile", "*.safetensors.*",
    "adapter_config.json",  # which makes transformers look for an adapter's weights
)  # fmt: skip
LEFTOVERS = (
    TRACKER, REPORT, RELEASE, "iter_*", "mp_rank_*", MODEL_FILE, "checkpoint-*", "checkpoint_*", "global_step*",
    "optimizer*", "scheduler.*", "rng_state*", "trainer_state.json", "trainer_log.jsonl", "training_args.*",
    "*_results.json", "training_loss.png", "zero_to_fp32.py", "latest", "events.out.tfevents*", "runs", "wandb",
    "tensorboard", "logs", "*.log", "nohup.out", "*.partial", "*.tmp", "*.lock", "*.idx", "__pycache__", "*.pyc",
    "cache", "lost+found",
)  # fmt: skip
# What a conversion reads, or writes anew: not worth a word.
EXPECTED = ("model*.safetensors", "model.safetensors.index.json", TRACKER, REPORT, RELEASE, "iter_*", ".*", "*.partial")


@dataclass
class ModelFiles:
    """Files of a folder, by their paths in it, and the names there of what does not travel."""

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def model_files(folder: Path) -> ModelFiles:
    """What of `folder` belongs to the model beside its weights; links to files count as files."""
    found = ModelFiles()
    for path in sorted(folder.iterdir()):
        files = _files_of(path)
        if files:
            found.files += [each.relative_to(folder) for each in files]
        elif not path.is_dir() or any(path.iterdir()):
            found.left_out.append(path.name)
    return found


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the files of a folder; none where it does not travel."""
    if path.is_file():
        return [path] if _travels(path) else []
    if not path.is_dir() or path.is_symlink() or _matches(path.name, LEFTOVERS) or path.name.startswith("."):
        return []
    files = []
    for each in _walk(path):
        files.append(each)
        # A folder with weights is another model, or this one in another format.
        if _matches(each.name, WEIGHTS) or len(files) > MAX_FOLDER_FILES:
            return []
    return [each for each in files if _travels(each)]


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _matches(name, LEFTOVERS))
        yield from (Path(place, name) for name in sorted(names))


def _travels(path: Path) -> bool:
    unwanted = path.name.startswith(".") or _matches(path.name, WEIGHTS) or _matches(path.name, LEFTOVERS)
    return not unwanted and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def copy_model_files(source: Path, target: Path) -> None:
    """Copies the model's files, byte for byte, and names what was left out."""
    target.mkdir(parents=True, exist_ok=True)
    if source.resolve() == target.resolve():
        return
    found = model_files(source)
    for name in found.files:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        shutil.copyfile(source / name, partial)
        partial.replace(path)
    told = [name for name in found.left_out if not _matches(name, EXPECTED)]
    if told:
        shown = ", ".join(told[:8]) + (f" and {len(told) - 8} more" if len(told) > 8 else "")
        kinds = f"weights, leftovers of training, hidden, over {MAX_FILE_BYTES >> 20} MiB or {MAX_FOLDER_FILES} files"
        logger.info("not copied from %s: %s (%s)", source, shown, kinds)
