"""Step 2 within this process, without the start of a Python process."""

from pathlib import Path
from typing import Any

from common.checkpoint.conversion.hf_to_megatron import HfToMegatron, convert_hf_to_megatron
from common.checkpoint.conversion.megatron_to_hf import MegatronToHf, convert_megatron_to_hf


def to_megatron(source: Path, target: Path, **settings: Any) -> Path:
    """`target`, the Megatron checkpoint of the Hugging Face folder `source`."""
    convert_hf_to_megatron(HfToMegatron(str(source), str(target), **settings), check=False)
    return target


def to_hf(source: Path, target: Path, **settings: Any) -> Path:
    """`target`, the Hugging Face folder of the Megatron checkpoint `source`."""
    convert_megatron_to_hf(MegatronToHf(str(source), str(target), **settings), check=False)
    return target
