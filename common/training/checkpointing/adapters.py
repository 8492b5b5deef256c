"""Loading of a PEFT adapter into the adapters of a model."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from common.checkpoint.formats.peft_folder import read_peft_adapter
from common.model.build import unwrap
from common.model.shape.config import QwenConfig
from common.model.shape.lora import LINEAR_OF, MATRICES, LoraConfig, tp_axis
from common.training.state.training_state import TrainingState


@torch.no_grad()
def load_peft_adapter(folder: Path, lora: LoraConfig, qwen: QwenConfig, training_state: TrainingState) -> None:
    """Loads this rank's part of the adapter in `folder` into the model and the master weights; raises KitError."""
    adapter = read_peft_adapter(folder, lora, qwen)
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for chunk in training_state.model:
        model: Any = unwrap(chunk)
        for layer in model.decoder.layers:
            for module in lora.targets:
                target = layer.get_submodule(f"{LINEAR_OF[module]}.adapters.{module}")
                for matrix in MATRICES:
                    whole, axis = adapter[layer.layer_number - 1, module, matrix], tp_axis(module, matrix)
                    getattr(target, matrix).copy_(whole if axis is None else whole.chunk(size, axis)[rank])
    training_state.optimizer.reload_model_params()
