"""Converts a Megatron checkpoint to a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

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
from common.checkpoint.conversion.output_folder import check_disk_space, check_output_folder, write_folder_atomically
from common.checkpoint.conversion.state_dict_adapter import hf_state_dict
from common.checkpoint.formats.checkpoint_paths import Checkpoint, require_checkpoint
from common.checkpoint.formats.hf_folder import check_unquantized, parse_size, write_safetensors
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.formats.model_files import copy_model_files
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
    checkpoints = checkpoints_to_average(checkpoint, settings.average)
    readers = [open_megatron(each, qwen, drop_rows=settings.drop_rows) for each in checkpoints]
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    tensors = mean_state_dict([hf_state_dict(reader, qwen, dtype) for reader in readers])
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
        options = {"from_megatron": True, "drop_rows": settings.drop_rows, "earlier": checkpoints[:-1]}
        verify_output(folder, checkpoint, qwen, settings, output=folder, target=target, **options)

    write_folder_atomically(target, write)
    logger.info("written: %s", target)


def _model_folder(settings: MegatronToHf, checkpoint: Checkpoint) -> Path:
    """The folder of config.json and the tokenizer."""
    if settings.hf_model_path:
        return Path(settings.hf_model_path)
    if not (checkpoint.folder / "config.json").is_file():
        raise KitError(f"{checkpoint.folder} has no config.json: set HF_MODEL_PATH to the original model")
    return checkpoint.folder
