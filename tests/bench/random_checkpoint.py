"""A Megatron checkpoint of random bf16 weights in a model's shape, for benches that need one to start from.

    python -m tests.bench.random_checkpoint MODEL_FOLDER TARGET

The weights are drawn on the GPU where there is one: 7B's take seconds there and minutes on a CPU.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.checkpoint.conversion.state_dict_adapter import hf_shapes
from common.checkpoint.formats.model_files import copy_model_files
from common.model.shape.config import load_config
from tests.conversion import to_megatron


def write(model: Path, target: Path) -> None:
    """Writes the Hugging Face folder `target`.hf, and from it the torch_dist checkpoint `target`."""
    qwen, device = load_config(model), "cuda" if torch.cuda.is_available() else "cpu"
    source = target.with_name(f"{target.name}.hf")
    copy_model_files(model, source)
    torch.manual_seed(0)
    tensors = {}
    for name, shape in hf_shapes(qwen).items():
        norm = name.endswith("norm.weight")
        drawn = torch.ones(shape) if norm else torch.randn(shape, device=device) * qwen.initializer_range
        tensors[name] = drawn.to(torch.bfloat16).cpu()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    tensors.clear()
    to_megatron(source, target, ckpt_format="torch_dist")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
