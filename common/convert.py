"""Step 2: `python -m common.convert` turns a Hugging Face model into a Megatron checkpoint, and back.

It needs no GPU, no Megatron-Core and no model in memory: tensors go from file to file, one at a time.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import errors, log
from common.checkpoint.conversion.planning import ExpectedFolder, plan_dist, plan_hf, plan_ranks
from common.checkpoint.conversion.streams import Source, dist_blocks, hf_shapes, hf_tensors, rank_chunks
from common.checkpoint.conversion.target import check_room, check_target, write_whole
from common.checkpoint.formats.arguments import megatron_arguments
from common.checkpoint.formats.dist_share import write_dist
from common.checkpoint.formats.hf_folder import (
    HfReader,
    check_unquantized,
    check_weights,
    parse_size,
    write_safetensors,
)
from common.checkpoint.formats.layout import (
    MODEL_FILE,
    RELEASE,
    Checkpoint,
    find_checkpoint,
    rank_dir_name,
    write_tracker,
)
from common.checkpoint.formats.mapping import IMPLEMENTATIONS
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.formats.model_files import REPORT, copy_model_files, model_files
from common.checkpoint.formats.pipeline import Layout
from common.checkpoint.formats.torch_format import save_rank_files
from common.checkpoint.io.checksums import check_all_files
from common.checkpoint.verification.inspection import WRITTEN_BY, inspect_folder
from common.checkpoint.verification.report import check_report, check_report_place, write_report
from common.checkpoint.verification.verify import verify
from common.errors import KitError
from common.log import logger
from common.model.shape.config import load_config, read_config
from common.parallel import parse_pipeline_layers
from common.progress import Progress
from common.settings import add_options, check_environment, from_namespace, option
from common.start import from_kit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HF_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
HELP_DROP_ROWS = "leave out rows of an embedding above vocab_size even where they hold values"
HELP_DTYPE = "of the written weights; default: as they are"


@dataclass(frozen=True)
class ToMegatron:
    """A Hugging Face folder to a Megatron checkpoint: weights only, under `release`."""

    load_checkpoint_path: str = option(help="Hugging Face folder: config.json, safetensors, tokenizer")
    save_checkpoint_path: str = option(help="new folder for the Megatron checkpoint")
    tp: int = option(1, "tensor parallel size")
    pp: int = option(1, "pipeline parallel size")
    vpp: int = option(1, "virtual pipeline chunks a rank")
    pipeline_layers: str | None = option(None, "layers of each stage (with VPP of each chunk), as 7,7,8,6")
    ckpt_format: str = option("torch", "torch: a file a rank; torch_dist: any parallel sizes", ("torch", "torch_dist"))
    transformer_impl: str = option("transformer_engine", "whose parameter names", IMPLEMENTATIONS)
    dtype: str | None = option(None, HELP_DTYPE, tuple(DTYPES))


@dataclass(frozen=True)
class ToHuggingFace:
    """A Megatron checkpoint to a Hugging Face folder that `transformers` loads."""

    load_checkpoint_path: str = option(help="Megatron checkpoint: its folder, or one iteration's")
    save_checkpoint_path: str = option(help="new folder for config.json, safetensors and tokenizer")
    hf_model_path: str | None = option(None, "config.json and tokenizer; default: what the checkpoint carries")
    dtype: str | None = option(None, HELP_DTYPE, tuple(DTYPES))
    max_shard_size: str = option("5GB", "largest safetensors file, unless one tensor is larger")
    drop_rows: bool = option(False, HELP_DROP_ROWS)


@dataclass(frozen=True)
class Verify:
    """Compares a Hugging Face folder with a Megatron checkpoint, bit for bit."""

    hf_model_path: str = option(help="Hugging Face folder")
    load_checkpoint_path: str = option(help="Megatron checkpoint: its folder, or one iteration's")
    dtype: str | None = option(None, "compare after casting both to it", tuple(DTYPES))
    drop_rows: bool = option(False, HELP_DROP_ROWS)
    report: str | None = option(None, "file for every tensor's shape, dtype, bytes and checksum, as JSON")
    logits: bool = option(False, "run both models in float32 too, in 8 bytes a parameter")
    text: str | None = option(None, "what they read with --logits; default: a few lines")


@dataclass(frozen=True)
class Inspect:
    """Tells what a folder is: its format, layout, sizes, and what wrote it."""

    path: str = option(help="Hugging Face folder, or Megatron checkpoint")


def to_megatron(settings: ToMegatron, check: bool, plan: bool = False) -> None:
    """Writes the Megatron checkpoint; with `check` only looks whether it can be written, with `plan` tells how."""
    source_folder, target = Path(settings.load_checkpoint_path), Path(settings.save_checkpoint_path)
    check_target(target, source_folder)
    qwen = load_config(source_folder)
    check_unquantized(source_folder)
    pipeline_layers = parse_pipeline_layers(settings.pipeline_layers)
    layout = Layout(settings.tp, settings.pp, settings.vpp, settings.transformer_impl, pipeline_layers)
    if settings.ckpt_format == "torch_dist":
        layout = Layout(1, 1, 1, "transformer_engine")
        logger.info(
            "torch_dist holds whole tensors: TP, PP, VPP, PIPELINE_LAYERS and TRANSFORMER_IMPL are training's to choose"
        )
    layout.check(qwen)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    if plan:
        expected = Source(ExpectedFolder(source_folder, qwen, getattr(torch, qwen.dtype)), qwen, dtype)
        print(*(plan_ranks(expected, layout) if settings.ckpt_format == "torch" else plan_dist(expected)), sep="\n")
        return
    reader = HfReader(source_folder)
    check_weights(reader, hf_shapes(qwen), qwen)
    source = Source(reader, qwen, dtype)
    check_room(target, written_bytes(source, layout if settings.ckpt_format == "torch" else None, source_folder))
    if check:
        print(f"ok: {len(reader.names)} tensors can be converted to {target}")
        return

    def write(folder: Path) -> None:
        copy_model_files(source_folder, folder)
        if dtype:
            set_dtype(folder / "config.json", HF_DTYPES[dtype])
        if settings.ckpt_format == "torch_dist":
            _write_torch_dist(source, folder / RELEASE)
        else:
            _write_ranks(source, layout, folder / RELEASE)
        write_tracker(folder, RELEASE)
        report = verify(source_folder, need_checkpoint(str(folder)), qwen, dtype)
        write_report((target if report.errors else folder) / REPORT, report, settings)
        check_report(report, target / REPORT)

    write_whole(target, write)
    logger.info("LOAD_CHECKPOINT_PATH=%s", target)


def written_bytes(source: Source, layout: Layout | None, folder: Path) -> int:
    """What a Megatron checkpoint of `layout`, or torch_dist, takes on the disk, but for headers."""
    if layout is None:
        tensors = [block.tensor for block in dist_blocks(source)]
    else:
        states = [rank_chunks(source, layout, p, t) for p in range(layout.pp) for t in range(layout.tp)]
        tensors = [tensor for state in states for chunk in state.values() for tensor in chunk.values()]
    return sum(tensor.num_bytes for tensor in tensors) + bytes_beside(folder)


def bytes_beside(folder: Path) -> int:
    """The bytes of the files of a model that are no weights."""
    return sum((folder / name).stat().st_size for name in model_files(folder).files)


def _write_torch_dist(source: Source, folder: Path) -> None:
    blocks = list(dist_blocks(source))
    with progress(sum(block.tensor.num_bytes for block in blocks)) as done:
        write_dist(folder, blocks, {"checkpoint_version": 3.0, "iteration": 0, **WRITTEN_BY}, done)


def _write_ranks(source: Source, layout: Layout, folder: Path) -> None:
    arguments = megatron_arguments(source.qwen, layout)
    ranks = [(pp_rank, tp_rank) for pp_rank in range(layout.pp) for tp_rank in range(layout.tp)]
    states: dict[tuple[int, int], dict[str, Any]] = {rank: dict(rank_chunks(source, layout, *rank)) for rank in ranks}
    sizes = [tensor.num_bytes for state in states.values() for chunk in state.values() for tensor in chunk.values()]
    with progress(sum(sizes)) as done:
        beside = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, **WRITTEN_BY}
        for stage in range(layout.pp):
            names = {rank_dir_name(tp_rank, stage, layout.pp): (stage, tp_rank) for tp_rank in range(layout.tp)}
            files = {folder / name / MODEL_FILE: {**beside, **states[rank]} for name, rank in names.items()}
            save_rank_files(files, done)


def to_hf(settings: ToHuggingFace, check: bool, plan: bool = False) -> None:
    """Writes the Hugging Face folder; with `check` only looks whether it can be written, with `plan` tells how."""
    target = Path(settings.save_checkpoint_path)
    checkpoint = need_checkpoint(settings.load_checkpoint_path)
    check_target(target, checkpoint.folder)
    max_shard_bytes = parse_size(settings.max_shard_size)
    model_folder = Path(settings.hf_model_path) if settings.hf_model_path else checkpoint.folder
    if not settings.hf_model_path and not (checkpoint.folder / "config.json").is_file():
        raise KitError(f"{checkpoint.folder} carries no config.json: set HF_MODEL_PATH to the model it came from")
    qwen = load_config(model_folder)
    check_unquantized(model_folder)
    reader = open_megatron(checkpoint, qwen, drop_rows=settings.drop_rows)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    tensors = hf_tensors(reader, qwen, dtype)
    if plan:
        print(*plan_hf(tensors, max_shard_bytes), sep="\n")
        return
    check_room(target, sum(tensor.num_bytes for tensor in tensors.values()) + bytes_beside(model_folder))
    if check:
        print(f"ok: {len(tensors)} tensors of {checkpoint.path} can be converted to {target}")
        return
    logger.info("reading %s: %s", checkpoint.path, reader.description)

    def write(folder: Path) -> None:
        copy_model_files(model_folder, folder)
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) == 1:
            set_dtype(folder / "config.json", HF_DTYPES[dtypes.pop()])
        with progress(sum(tensor.num_bytes for tensor in tensors.values())) as done:
            names = write_safetensors(folder, tensors, max_shard_bytes, done)
        logger.info("%d tensors in %d files", len(tensors), len(names) - (len(names) > 1))
        report = verify(folder, checkpoint, qwen, dtype, from_megatron=True, drop_rows=settings.drop_rows)
        write_report((target if report.errors else folder) / REPORT, report, settings)
        check_report(report, target / REPORT)

    write_whole(target, write)
    logger.info("written: %s", target)


def set_dtype(path: Path, dtype: str) -> None:
    """Makes config.json tell the dtype of the weights beside it; a file that does so already stays as it is."""
    values = read_config(path.parent)
    name = "dtype" if "dtype" in values else "torch_dtype"
    if values.get(name) != dtype:
        logger.info("config.json: %s %s -> %s, as the weights are", name, values.get(name), dtype)
        values[name] = dtype
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compare(settings: Verify, check: bool) -> None:
    """Compares the two sides; with `check` only looks whether they can be compared."""
    folder, checkpoint = Path(settings.hf_model_path), need_checkpoint(settings.load_checkpoint_path)
    if settings.report:
        check_report_place(Path(settings.report))
    qwen = load_config(folder)
    check_unquantized(folder)
    check_weights(HfReader(folder), hf_shapes(qwen), qwen)
    open_megatron(checkpoint, qwen, drop_rows=settings.drop_rows)
    if check:
        print(f"ok: {folder} and {checkpoint.path} can be compared")
        return
    files = check_all_files(checkpoint.path)
    if files:
        logger.info("%s: %d files are as they were written, by size and CRC-32", checkpoint.path, files)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    report = verify(folder, checkpoint, qwen, dtype, drop_rows=settings.drop_rows)
    if settings.report:
        write_report(Path(settings.report), report, settings)
    check_report(report, Path(settings.report) if settings.report else None)
    if settings.logits:  # in a process of its own: this command does without Megatron-Core
        flags = [f"--hf-model-path={folder}", f"--load-checkpoint-path={settings.load_checkpoint_path}"]
        flags += [f"--text={settings.text}"] if settings.text else []
        with from_kit():
            done = subprocess.run([sys.executable, "-m", "common.logits", *flags], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)


def tell(settings: Inspect, check: bool) -> None:
    """Prints what the folder is."""
    print(*(f"{name}: {value}" for name, value in inspect_folder(Path(settings.path)).items()), sep="\n")


def need_checkpoint(path: str) -> Checkpoint:
    """The newest checkpoint of `path`; raises KitError where there is none."""
    found = find_checkpoint(Path(path)) if Path(path).is_dir() else None
    if found is None:
        raise KitError(f"LOAD_CHECKPOINT_PATH={path} holds no Megatron checkpoint: give step 2's or a run's folder")
    return found


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], Any]]:
    """The function that is told of bytes: over it a bar runs when a person watches, else the log tells each minute."""
    with Progress(total) as bar:
        yield bar.update


COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    "hf-to-megatron": (ToMegatron, to_megatron),
    "megatron-to-hf": (ToHuggingFace, to_hf),
    "verify": (Verify, compare),
    "inspect": (Inspect, tell),
}


def main() -> None:
    """Runs the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m common.convert", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (settings, _) in COMMANDS.items():
        command = commands.add_parser(name, help=settings.__doc__, description=settings.__doc__)
        if settings is Inspect:
            command.add_argument("path", help="Hugging Face folder, or Megatron checkpoint")
        else:
            add_options(command, settings)
        if settings in (ToMegatron, ToHuggingFace):
            command.add_argument("--plan", action="store_true", help="print where every tensor would go, and stop")
        command.add_argument("--check", action="store_true", help="look whether it can be done, and stop")
    arguments = parser.parse_args()
    log.setup()
    torch.set_num_threads(1)  # the disk and two threads of ours are busy; more would only wait, spinning
    settings_type, run = COMMANDS[arguments.command]
    plan = {"plan": True} if getattr(arguments, "plan", False) else {}
    settings = from_namespace(settings_type, arguments)
    if settings_type in (ToMegatron, ToHuggingFace):  # those of a script, which reads the environment
        check_environment(settings)
    run(settings, arguments.check, **plan)


if __name__ == "__main__":
    errors.run(main)
