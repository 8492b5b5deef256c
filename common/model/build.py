"""This rank's part of the model: Megatron-Core's GPTModel in Qwen's shape, one for each virtual pipeline chunk."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from common.mcore import (
    chunk_place,
    first_and_last_differ,
    fuse_rotary_embedding,
    joins_norms,
    single_qkv_rope,
    use_kernels,
    weight_gradient_fusion,
)
from common.model.attention import KINDS, SdpaAttention, choose
from common.model.config import QwenConfig
from common.model.gpt import QwenModel
from common.model.joined_norm import join
from common.model.layer_spec import block_spec
from common.model.rope import yarn_frequencies
from common.parallel import ParallelSizes
from common.platforms.base import Platform
from common.te import fp8_options

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    core_attention: str = "auto"  # a kind of common.model.attention, or auto: the platform's first that works
    joins_rows: bool = False  # packed samples are told apart by their bounds


def transformer_config(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform
) -> TransformerConfig:
    """Megatron-Core's configuration of `qwen` under these sizes."""
    dtype = DTYPES[options.precision]
    fused = platform.fused_kernels
    engine = options.transformer_impl == "transformer_engine"
    return TransformerConfig(
        num_layers=qwen.num_hidden_layers,
        hidden_size=qwen.hidden_size,
        ffn_hidden_size=qwen.intermediate_size,
        num_attention_heads=qwen.num_attention_heads,
        num_query_groups=qwen.num_key_value_heads,
        kv_channels=qwen.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=qwen.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=qwen.qkv_bias,
        qk_layernorm=qwen.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        softmax_scale=qwen.yarn.softmax_factor / math.sqrt(qwen.head_dim) if qwen.yarn else None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=qwen.initializer_range,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        sequence_parallel=options.sequence_parallel and sizes.tp > 1,
        # With VPP, batched sends at PP=2 swap the two neighbours' tensors and train on them without an error.
        overlap_p2p_comm=sizes.vpp > 1,
        batch_p2p_comm=sizes.vpp == 1,
        # With VPP, Megatron-Core frees an output whose send is still under way: on gloo the neighbour was seen to train
        # on what had overwritten it (first loss 5.998 for 5.979).
        deallocate_pipeline_outputs=sizes.vpp == 1,
        calculate_per_token_loss=True,
        use_cpu_initialization=platform.device == "cpu",
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=engine,
        apply_rope_fusion=engine,
        gradient_accumulation_fusion=engine,
        **pipeline_options(qwen.chunk_layers(sizes.pp, sizes.vpp, sizes.pipeline_layers), sizes.vpp),
        tp_comm_overlap=options.tp_comm_overlap,
        # Its kernel knows neither bounds of packed samples nor a norm between the split and the rotation.
        **single_qkv_rope(fused and not options.joins_rows and not qwen.qk_norm),
        **fp8_options(options.fp8_format, options.fp8_recipe),
        **_recompute(options),
    )


def pipeline_options(chunk_layers: tuple[int, ...], vpp: int) -> dict[str, Any]:
    """What tells Megatron-Core these numbers of layers, one a chunk in the model's order; nothing where they are even.

    Every version has a number of its own for the first and the last stage; from 0.13 on any chunk may have its own.
    """
    if len(set(chunk_layers)) == 1:
        return {}
    if first_and_last_differ(chunk_layers, vpp):
        return {
            "num_layers_in_first_pipeline_stage": chunk_layers[0],
            "num_layers_in_last_pipeline_stage": chunk_layers[-1],
        }
    stages = [["decoder"] * num_layers for num_layers in chunk_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return {"pipeline_model_parallel_layout": stages}


def _recompute(options: ModelOptions) -> dict[str, Any]:
    """Recompute nothing, each layer's core attention (selective) or whole layers (full), all or the chunk's first."""
    if options.recompute == "full" and options.recompute_num_layers:
        layers = options.recompute_num_layers
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}
    if options.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective"} if options.recompute == "selective" else {}


def build_model(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform, seq_length: int
) -> list[torch.nn.Module]:
    """The chunks that this rank holds, on its device, with random weights; bf16 ones wrapped in Float16Module."""
    config = transformer_config(qwen, sizes, options, platform)
    core = core_attention(qwen, sizes, options, platform)
    chunks: list[torch.nn.Module] = []
    if platform.fused_kernels:
        _use_kernels(options.transformer_impl)
    with weight_gradient_fusion(chunks):
        chunks += [_chunk(config, qwen, sizes, options, platform, core, seq_length, i) for i in range(sizes.vpp)]
    if platform.device == "cuda":
        chunks = [chunk.cuda(torch.cuda.current_device()) for chunk in chunks]
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else chunks


def _use_kernels(transformer_impl: str) -> None:
    from common.model.qkv_rope import split_and_rotate  # these import triton, which is not everywhere
    from common.model.swiglu import bias_swiglu

    use_kernels(bias_swiglu, split_and_rotate)
    if transformer_impl == "local":
        fuse_rotary_embedding()


def core_attention(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform
) -> type[SdpaAttention] | None:
    """What attends in each layer, probed on this rank's device; None: Transformer Engine's layers keep their own."""
    engine = options.transformer_impl == "transformer_engine"
    if options.precision == "fp32" or options.joins_rows or sizes.cp > 1:
        return None if engine else SdpaAttention  # flash_attn has no float32; the others go by bounds and ranks
    told = options.core_attention
    preferred = platform.core_attention if told == "auto" else (told,)
    if engine and told == "auto":
        preferred = tuple(kind for kind in preferred if KINDS[kind].before_engine)
        if not preferred:
            return None
    device = torch.device("cuda", torch.cuda.current_device()) if platform.device == "cuda" else torch.device("cpu")
    heads = (qwen.num_attention_heads // sizes.tp, qwen.num_key_value_heads // sizes.tp, qwen.head_dim)
    return choose(preferred, heads, device, engine=engine and told == "auto")


def _chunk(
    config: TransformerConfig,
    qwen: QwenConfig,
    sizes: ParallelSizes,
    options: ModelOptions,
    platform: Platform,
    core: type[SdpaAttention] | None,
    seq_length: int,
    index: int,
) -> torch.nn.Module:
    chunk = index * sizes.pp + parallel_state.get_pipeline_model_parallel_rank()
    num_layers = qwen.chunk_layers(sizes.pp, sizes.vpp, sizes.pipeline_layers)[chunk]
    first, last, more = chunk_place(index, sizes.vpp)
    joined = has_joined_norms(options, platform)
    model = QwenModel(
        num_tokens=qwen.vocab_size,
        triton=platform.fused_kernels,
        config=config,
        transformer_layer_spec=block_spec(
            options.transformer_impl, num_layers, qwen.qk_norm, core, joined_norms=joined
        ),
        vocab_size=qwen.padded_vocab_size(sizes.tp),
        max_sequence_length=seq_length,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=qwen.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=qwen.rope_theta,
        **more,
    )
    if joined:
        from common.model.norm_kernels import TritonNorms  # imports triton, which is not everywhere

        join(model.decoder, TritonNorms(), across_layers=options.recompute != "full")
    if qwen.yarn:
        frequencies = yarn_frequencies(qwen.yarn, qwen.head_dim, qwen.rope_theta)
        model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq.device)
    return model


def has_joined_norms(options: ModelOptions, platform: Platform) -> bool:
    """Whether sums are normed as they are added: not where Transformer Engine joins norm and product to a purpose."""
    apart = options.fp8_format == "none" and not options.tp_comm_overlap
    return platform.fused_kernels and joins_norms() and apart


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside the wrappers of data parallelism and precision."""
    while hasattr(module, "module"):
        module = module.module  # type: ignore[assignment]
    return module
