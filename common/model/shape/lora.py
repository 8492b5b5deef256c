"""LoRA's settings and the shapes of its adapters (arXiv 2106.09685), without torch.

An adapter of a linear layer with weight W [o, i] adds (alpha / r) B A x to W x, with A [r, i] and B [o, r]. Modules
have Hugging Face's names, of which Megatron-Core fuses q, k and v, and gate and up.
"""

from dataclasses import dataclass

from common.model.shape.config import QwenConfig

# Hugging Face's modules in Megatron's order, by Megatron's linear layer.
LINEARS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
MODULES = tuple(module for modules in LINEARS.values() for module in modules)
LINEAR_OF = {module: linear for linear, modules in LINEARS.items() for module in modules}
ROW_PARALLEL = ("o_proj", "down_proj")  # input features split over TP ranks; the others: output features
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output layer
ADAPTERS = "adapters"  # the submodule of a linear layer that holds them
MATRICES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoraConfig:
    """What defines a run's adapters; `targets` in the order of MODULES."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / self.rank

    @property
    def linears(self) -> tuple[str, ...]:
        """Megatron-Core's linear layers that have adapters."""
        return tuple(linear for linear, modules in LINEARS.items() if set(modules) & set(self.targets))

    @property
    def adapts_mlp(self) -> bool:
        """Whether the MLP has adapters."""
        return any(linear.startswith("mlp.") for linear in self.linears)


def features(module: str, qwen: QwenConfig) -> tuple[int, int]:
    """(output features, input features) of `module`."""
    h, f, d = qwen.hidden_size, qwen.intermediate_size, qwen.head_dim
    heads, groups = qwen.num_attention_heads * d, qwen.num_key_value_heads * d
    return {
        "q_proj": (heads, h),
        "k_proj": (groups, h),
        "v_proj": (groups, h),
        "o_proj": (h, heads),
        "gate_proj": (f, h),
        "up_proj": (f, h),
        "down_proj": (h, f),
    }[module]


def adapter_shapes(module: str, rank: int, qwen: QwenConfig) -> dict[str, tuple[int, int]]:
    """The shapes of `module`'s two matrices, not split over TP."""
    outputs, inputs = features(module, qwen)
    return {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}


def tp_axis(module: str, matrix: str) -> int | None:
    """The axis along which a matrix is split over TP ranks; None: each has all of it."""
    if module in ROW_PARALLEL:
        return 1 if matrix == "lora_A" else None
    return 0 if matrix == "lora_B" else None


def adapter_parameters(lora: LoraConfig, qwen: QwenConfig, tp: int = 1) -> int:
    """The number of parameters of one layer's adapters on a TP rank."""
    total = 0
    for module in lora.targets:
        for matrix, (rows, columns) in adapter_shapes(module, lora.rank, qwen).items():
            total += rows * columns // (1 if tp_axis(module, matrix) is None else tp)
    return total


def is_adapter(name: str) -> bool:
    """Whether a Megatron parameter belongs to an adapter."""
    return f".{ADAPTERS}." in name


def megatron_name(module: str, matrix: str, layer: int | None = None) -> str:
    """The adapter's name in a Megatron state dict; without `layer` the key of all layers stacked, in torch_dist."""
    where = "decoder.layers." + ("" if layer is None else f"{layer}.")
    return f"{where}{LINEAR_OF[module]}.{ADAPTERS}.{module}.{matrix}"


def hf_module(module: str, layer: int) -> str:
    """The module's name in a Hugging Face model."""
    part = "mlp" if LINEAR_OF[module].startswith("mlp") else "self_attn"
    return f"model.layers.{layer}.{part}.{module}"


def peft_name(module: str, matrix: str, layer: int) -> str:
    """The adapter's name in PEFT's adapter_model.safetensors.

    Source: get_peft_model_state_dict in peft/utils/save_and_load.py.
    """
    return f"base_model.model.{hf_module(module, layer)}.{matrix}.weight"
