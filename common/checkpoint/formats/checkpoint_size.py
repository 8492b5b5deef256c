"""The size of a run's checkpoints, before they are written."""

from common.model.shape.config import QwenConfig
from common.model.shape.lora import LoraConfig, adapter_parameters
from common.model.shape.parameters import ELEMENT_BYTES, num_parameters, vocabulary_parameters

# Master weights and Adam's two moments. In fp32 the weights are written twice; torch format casts bf16 moments to fp32
# (get_parameter_state_dp_zero in Megatron-Core's optimizer/distrib_optimizer.py, 0.16).
OPTIMIZER_BYTES = {"fp32": 12, "cpu": 12, "bf16": 8, "cpu_bf16": 8}


def checkpoint_bytes(
    qwen: QwenConfig,
    precision: str,
    *,
    save_optimizer: bool = True,
    ckpt_format: str = "torch_dist",
    pp: int = 1,
    optimizer_state: str = "fp32",
    lora: LoraConfig | None = None,
) -> int:
    """Bytes of the tensors in one training checkpoint.

    In torch format, tied embeddings with several pipeline stages are stored on the first and the last one.
    With `lora` a checkpoint holds the adapters alone.
    Not counted: names and shapes (0.3 MB at 4 layers in torch_dist), RNG states, vocabulary padding.
    """
    parameters = num_parameters(qwen)
    if ckpt_format == "torch" and pp > 1 and qwen.tie_word_embeddings:
        parameters += vocabulary_parameters(qwen, 1)
    if lora:
        parameters = qwen.num_hidden_layers * adapter_parameters(lora, qwen)
    optimizer = OPTIMIZER_BYTES["fp32" if ckpt_format == "torch" else optimizer_state]
    return parameters * (ELEMENT_BYTES[precision] + (optimizer if save_optimizer else 0))
