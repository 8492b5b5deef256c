"""How a model runs: what training chooses of it, beside its shape."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelOptions:
    """How the model runs, beside what it is."""

    precision: str  # bf16 or fp32
    transformer_impl: str  # transformer_engine or local
    recompute: str  # none, selective or full
    recompute_num_layers: int | None = None  # with full: of each chunk; None: all
    sequence_parallel: bool = True  # with TP above 1
    tp_comm_overlap: bool = False
    fp8_format: str = "none"  # none, hybrid or e4m3
    fp8_recipe: str = "tensorwise"
    core_attention: str = "auto"  # a kind of common.model.layers.attention, or auto: the platform's first that works
    fused_products: str = "auto"  # SwiGLU and the loss inside matrix products: auto (where that works), true or false
    weighted: bool = False  # tokens may have other weights in the loss than 0 and 1
    packed_sequences: bool = False  # packed samples are told apart by their bounds
    mcore: tuple[str, ...] = ()  # fields of TransformerConfig by name (common.engine.overrides)
    deterministic: bool = (
        False  # the same bits in each run; torch has to be told before (common.training.planning.determinism)
    )
