"""Steps that both directions of a conversion share."""

import json
from pathlib import Path
from typing import Any

import torch

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.formats.model_files import REPORT, model_files
from common.checkpoint.verification.report import check_report, write_report
from common.checkpoint.verification.verify import verify
from common.log import logger
from common.model.shape.config import QwenConfig, read_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_HELP = "dtype of the written weights; default: unchanged"
DROP_ROWS_HELP = "drop embedding rows above vocab_size even if they hold values"


def other_files_bytes(folder: Path) -> int:
    """The size of the model's files beside its weights."""
    return sum((folder / name).stat().st_size for name in model_files(folder).files)


def set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Sets the dtype in config.json to that of the weights; a file that has it already is not rewritten."""
    config, value = read_config(path.parent), str(dtype).removeprefix("torch.")
    name = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(name) != value:
        logger.info("config.json: %s %s -> %s, as in the weights", name, config.get(name), value)
        config[name] = value
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify_output(
    hf_folder: Path,
    checkpoint: Checkpoint,
    qwen: QwenConfig,
    settings: Any,
    *,
    output: Path,
    target: Path,
    **options: Any,
) -> None:
    """Verifies the weights just written to `output` and writes the report there, or to `target` if they differ.

    options: of `verify`. Raises KitError where the two sides differ.
    """
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    report = verify(hf_folder, checkpoint, qwen, dtype, **options)
    write_report((target if report.errors else output) / REPORT, report, settings)
    check_report(report, target / REPORT)
