"""The files of a model beside its weights, such as the tokenizer: all in its folder except the patterns here."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, RELEASE, TRACKER
from common.log import logger

REPORT = "conversion_report.json"
PROFILE_FOLDER = "profile"
# What training writes beside its checkpoints.
RUN_FILES = ("log.txt", "metrics.jsonl", "run.json", "tensorboard", PROFILE_FOLDER)
KEPT = "kept_checkpoints.json"  # beside them too
MAX_FILE_BYTES = 64 << 20  # the largest tokenizers have 20 MB
MAX_FOLDER_FILES = 1000
WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf",
    "*.ggml", "*.h5", "*.msgpack", "*.npz", "*.npy", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.tflite", "*.pkl",
    "*.pickle", "*.distcp", "*.engine", "*.mlmodel", "*.ot", "*.nemo", "*.llamafile", "*.safetensors.*",
    "adapter_config.json",  # which makes transformers look for an adapter's weights
)  # fmt: skip
TRAINING_FILES = (
    *RUN_FILES, KEPT, TRACKER, REPORT, RELEASE, "iter_*", "mp_rank_*", MODEL_FILE, "checkpoint-*", "checkpoint_*",
    "global_step*", "optimizer*", "scheduler.*", "rng_state*", "trainer_state.json", "trainer_log.jsonl",
    "training_args.*", "*_results.json", "training_loss.png", "zero_to_fp32.py", "latest", "events.out.tfevents*",
    "runs", "wandb", "logs", "*.log", "nohup.out", "*.partial", "*.tmp", "*.lock", "*.idx", "__pycache__", "*.pyc",
    "cache", "lost+found",
)  # fmt: skip
# Read or rewritten by a conversion: skipped without a message.
EXPECTED = (
    "model*.safetensors", "model.safetensors.index.json", TRACKER, REPORT, RELEASE, "iter_*", ".*", "*.partial",
    *RUN_FILES, KEPT, "*.reference_*.npz",
)  # fmt: skip


@dataclass
class ModelFiles:
    """The files to copy, relative to the folder, and the names of what is skipped."""

    files: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def model_files(folder: Path) -> ModelFiles:
    """The files of `folder` that belong to the model beside its weights; symlinks to files count as files."""
    found = ModelFiles()
    for path in sorted(folder.iterdir()):
        files = _files_of(path)
        if files:
            found.files += [each.relative_to(folder) for each in files]
        elif not path.is_dir() or any(path.iterdir()):
            found.skipped.append(path.name)
    return found


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the files of a folder; empty where it is not copied."""
    if path.is_file():
        return [path] if _is_copied(path) else []
    if not path.is_dir() or path.is_symlink() or _matches(path.name, TRAINING_FILES) or path.name.startswith("."):
        return []
    files = []
    for each in _walk(path):
        files.append(each)
        # A folder with weights is another model, or this one in another format.
        if _matches(each.name, WEIGHTS) or len(files) > MAX_FOLDER_FILES:
            return []
    return [each for each in files if _is_copied(each)]


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _matches(name, TRAINING_FILES))
        yield from (Path(place, name) for name in sorted(names))


def _is_copied(path: Path) -> bool:
    excluded = path.name.startswith(".") or _matches(path.name, WEIGHTS) or _matches(path.name, TRAINING_FILES)
    return not excluded and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def copy_model_files(source: Path, target: Path) -> None:
    """Copies the model's files unchanged and logs what was skipped."""
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
    skipped = [name for name in found.skipped if not _matches(name, EXPECTED)]
    if skipped:
        shown = ", ".join(skipped[:8]) + (f" and {len(skipped) - 8} more" if len(skipped) > 8 else "")
        kinds = f"weights, training files, hidden files, over {MAX_FILE_BYTES >> 20} MiB or {MAX_FOLDER_FILES} files"
        logger.info("not copied from %s: %s (%s)", source, shown, kinds)
