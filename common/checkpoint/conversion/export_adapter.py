"""Exports a checkpoint of adapters as PEFT's folder, or finds the checkpoint whose weights they are merged into."""

from pathlib import Path

from common.checkpoint.conversion.output_folder import check_disk_space, write_folder_atomically
from common.checkpoint.formats.adapter_checkpoint import AdapterOf, check_base, read_adapter
from common.checkpoint.formats.checkpoint_paths import Checkpoint, find_checkpoint
from common.checkpoint.formats.peft_folder import write_peft_folder
from common.checkpoint.verification.adapters import check_peft_folder
from common.errors import KitError
from common.log import logger
from common.model.shape.config import QwenConfig


def base_of(found: AdapterOf, checkpoint: Checkpoint, given: str | None) -> Checkpoint:
    """The checkpoint that `checkpoint` adapts, at `given` or where the run read it; raises KitError without it."""
    path = Path(given or found.base)
    base = find_checkpoint(path) if path.is_dir() else None
    if base is None:
        raise KitError(
            f"{path} holds no checkpoint, and the adapters of {checkpoint.path} are to be merged into its weights: set"
            " BASE_CHECKPOINT_PATH to where they are now, or EXPORT=adapter"
        )
    check_base(found, base, checkpoint, "BASE_CHECKPOINT_PATH")
    return base


def export_adapter(
    checkpoint: Checkpoint, found: AdapterOf, qwen: QwenConfig, target: Path, base_model: str | None, check: bool
) -> None:
    """Writes PEFT's folder to `target`; base_model: what its config names as the model, if known."""
    adapter = read_adapter(checkpoint, found.lora, qwen)
    check_disk_space(target, sum(tensor.nbytes for tensor in adapter.values()))
    if check:
        print(f"ok: {len(adapter)} adapter tensors of {checkpoint.path} can be exported to {target}")
        return

    def write(folder: Path) -> None:
        write_peft_folder(folder, adapter, found.lora, base_model)
        check_peft_folder(folder, checkpoint, qwen)

    write_folder_atomically(target, write)
    logger.info("%d adapter tensors, the same bits as in %s: written: %s", len(adapter), checkpoint.path, target)
