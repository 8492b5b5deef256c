"""A model folder loaded by transformers onto a device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from common import errors
from common.checkpoint.conversion.common_steps import DTYPES
from common.errors import KitError
from common.inference.model_folder import ModelFolder
from common.log import logger
from common.settings import option


@dataclass(frozen=True)
class ModelSettings:
    """Which model, in which dtype, on which device."""

    hf_model_path: str = option(
        help="Hugging Face folder: what step 2 exported, or another Qwen2 or Qwen3 model", hub="model"
    )
    dtype: str | None = option(None, "dtype to compute in; default: that of the weights", tuple(DTYPES))
    device: str = option("auto", "auto: cuda if there is a GPU (MetaX's too), else cpu; or cpu, cuda, cuda:1, ...")


def find_device(name: str) -> torch.device:
    """The device that DEVICE=`name` means; raises KitError where it is unknown or not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (name != kind and not index.isdecimal()):
        raise KitError(f"DEVICE={name} is unknown: set it to auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise KitError(f"DEVICE={name}: torch sees {torch.cuda.device_count()} GPUs here: set DEVICE to auto or cpu")
    return torch.device(name)


def load_model(folder: ModelFolder, settings: ModelSettings) -> Any:
    """transformers' model of `folder`, in evaluation mode; raises KitError where the device lacks memory for it."""
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    device = find_device(settings.device)
    dtype = DTYPES[settings.dtype] if settings.dtype else "auto"
    # transformers 4.56 renamed it.
    name = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
    with explain_out_of_memory("set DTYPE=bf16, or serve the model on several GPUs (docs/use.md)"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False, use_safetensors=True, **{name: dtype}
        ).to(device)
    logger.info("model: %s, %s on %s", folder.path, str(model.dtype).removeprefix("torch."), device)
    return model.eval()


@contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turns an out-of-memory error of the block into a KitError with `remedy`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = errors.out_of_memory(error)
        if text is None:
            raise
        raise KitError(f"out of memory ({text}): {remedy}") from error
