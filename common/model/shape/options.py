"""ModelOptions: the training settings that a model is built with, besides its config."""

from dataclasses import dataclass

from common.model.shape.lora import LoraConfig


@dataclass(frozen=True)
class ModelOptions:
    """The training settings that the model is built with."""

    precision: str  # bf16 or fp32
    transformer_impl: str  # transformer_engine or local
    recompute: str  # none, selective or full
    recompute_num_layers: int | None = None  # with full: layers per chunk; None: all
    sequence_parallel: bool = True  # only with TP > 1
    tp_comm_overlap: str = "auto"  # true: by Transformer Engine's buffers; auto: by the copy engines, if that works
    fp8_format: str = "none"  # none, hybrid or e4m3
    fp8_recipe: str = "tensorwise"
    core_attention: str = "auto"  # a key of KINDS in common.model.layers.attention, or auto
    fused_products: str = "auto"  # SwiGLU and the loss fused into GEMMs: auto (if that works), true or false
    weighted: bool = False  # the loss has weights other than 0 and 1
    per_token_gradients: bool = False  # the loss is no weighted sum over tokens, as that of preferences
    separate_documents: bool = False  # rows of several documents, each attending to itself
    packed_sequences: bool = False  # them in Transformer Engine's "thd" format, with cu_seqlens
    mcore: tuple[str, ...] = ()  # fields of TransformerConfig by name (common.engine.overrides)
    lora: LoraConfig | None = None  # train adapters, and nothing else
    seed: int = 0  # of the adapters
    deterministic: bool = False  # bit-identical runs; needs torch's mode (common.training.planning.determinism)
