"""Converts a Megatron checkpoint to a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint.conversion.average import checkpoints_to_average, mean_state_dict
from common.checkpoint.conversion.common_steps import (
    DROP_ROWS_HELP,
    DTYPE_HELP,
    DTYPES,
    other_files_bytes,
    set_config_dtype,
    verify_output,
)
from common.checkpoint.conversion.conversion_plan import plan_hf
from common.checkpoint.conversion.export_adapter import base_of, export_adapter
from common.checkpoint.conversion.merge import merged_state_dict
from common.checkpoint.conversion.output_folder import check_disk_space, check_output_folder, write_folder_atomically
from common.checkpoint.conversion.state_dict_adapter import hf_state_dict
from common.checkpoint.formats.adapter_checkpoint import AdapterOf, adapter_of, read_adapter
from common.checkpoint.formats.checkpoint_paths import Checkpoint, require_checkpoint
from common.checkpoint.formats.hf_folder import check_unquantized, parse_size, write_safetensors
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.formats.model_files import copy_model_files
from common.checkpoint.verification.adapters import Deltas, adapter_matrices
from common.errors import KitError
from common.log import logger
from common.model.shape.config import load_config
from common.progress import Progress
from common.settings import option


@dataclass(frozen=True)
class MegatronToHf:
    """Converts a Megatron checkpoint to a Hugging Face folder that `transformers` loads."""

    load_checkpoint_path: str = option(help="Megatron checkpoint: its folder, or the folder of an iteration")
    save_checkpoint_path: str = option(help="new folder for config.json, safetensors and tokenizer")
    hf_model_path: str | None = option(
        None, "source of config.json and tokenizer; default: those in the checkpoint", hub="tokenizer"
    )
    dtype: str | None = option(None, DTYPE_HELP, tuple(DTYPES))
    max_shard_size: str = option("5GB", "largest safetensors file, unless one tensor is larger")
    average: int = option(1, "write the mean of so many of the newest checkpoints")
    export: str = option("merged", "of a LoRA adapter: whole weights, merged, or a PEFT folder", ("merged", "adapter"))
    base_checkpoint_path: str | None = option(
        None, "to merge: the checkpoint whose weights a LoRA adapter adds to; default: where the run read it"
    )
    drop_rows: bool = option(False, DROP_ROWS_HELP)


def convert_megatron_to_hf(settings: MegatronToHf, check: bool, plan: bool = False) -> None:
    """Writes the Hugging Face folder; `check`: only check that it can be written; `plan`: only print the plan."""
    target = Path(settings.save_checkpoint_path)
    checkpoint = require_checkpoint(Path(settings.load_checkpoint_path))
    check_output_folder(target, checkpoint.folder)
    max_shard_bytes = parse_size(settings.max_shard_size)
    model_folder = _model_folder(settings, checkpoint)
    qwen = load_config(model_folder)
    check_unquantized(model_folder)
    found = adapter_of(checkpoint)
    _check_export(settings, checkpoint, found)
    if found and settings.export == "adapter":
        export_adapter(checkpoint, found, qwen, target, settings.hf_model_path, check or plan)
        return
    whole = base_of(found, checkpoint, settings.base_checkpoint_path) if found else checkpoint
    checkpoints = checkpoints_to_average(whole, settings.average)
    readers = [open_megatron(each, qwen, drop_rows=settings.drop_rows) for each in checkpoints]
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    tensors = mean_state_dict([hf_state_dict(reader, qwen, dtype) for reader in readers])
    if found:
        tensors = merged_state_dict(tensors, read_adapter(checkpoint, found.lora, qwen), found.lora, qwen)
    if plan:
        print(*plan_hf(tensors, max_shard_bytes), sep="\n")
        return
    weight_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    check_disk_space(target, weight_bytes + other_files_bytes(model_folder))
    if check:
        print(f"ok: {len(tensors)} tensors of {checkpoint.path} can be converted to {target}")
        return
    for each, reader in zip(checkpoints, readers, strict=True):
        logger.info("reading %s: %s", each.path, reader.description)

    def write(folder: Path) -> None:
        copy_model_files(model_folder, folder)
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) == 1:
            set_config_dtype(folder / "config.json", dtypes.pop())
        with Progress(weight_bytes) as progress:
            names = write_safetensors(folder, tensors, max_shard_bytes, progress.update)
        logger.info("%d tensors in %d files", len(tensors), len(names) - (len(names) > 1))
        options: dict[str, Any] = {"from_megatron": True, "drop_rows": settings.drop_rows, "earlier": checkpoints[:-1]}
        if found:
            options["deltas"] = Deltas(adapter_matrices(checkpoint, qwen), found.lora.alpha / found.lora.rank)
        verify_output(folder, whole, qwen, settings, output=folder, target=target, **options)

    write_folder_atomically(target, write)
    logger.info("written: %s", target)


def _check_export(settings: MegatronToHf, checkpoint: Checkpoint, found: AdapterOf | None) -> None:
    """Raises KitError for settings that do not go with what the checkpoint holds."""
    if found is None and settings.export == "adapter":
        raise KitError(f"EXPORT=adapter, but {checkpoint.path} holds whole weights: set EXPORT=merged")
    if found is None and settings.base_checkpoint_path:
        raise KitError(
            f"BASE_CHECKPOINT_PATH={settings.base_checkpoint_path}: {checkpoint.path} holds whole weights, and adds to"
            " none: unset it"
        )
    if found and settings.average > 1:
        raise KitError(
            f"AVERAGE={settings.average}: {checkpoint.path} holds a LoRA adapter, and the mean of adapters is not the"
            " adapter of the mean: set AVERAGE=1"
        )
    if found and settings.export == "adapter" and settings.dtype:
        raise KitError(f"DTYPE={settings.dtype} with EXPORT=adapter: an adapter keeps its dtype: unset DTYPE")


def _model_folder(settings: MegatronToHf, checkpoint: Checkpoint) -> Path:
    """The folder of config.json and the tokenizer."""
    if settings.hf_model_path:
        return Path(settings.hf_model_path)
    if not (checkpoint.folder / "config.json").is_file():
        raise KitError(f"{checkpoint.folder} has no config.json: set HF_MODEL_PATH to the original model")
    return checkpoint.folder
