"""This rank's part of the model: Megatron-Core's GPTModel in Qwen's shape, one for each virtual pipeline chunk."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from common.engine.overrides import named_refusals, overrides
from common.engine.patches import single_qkv_rope, weight_gradient_fusion
from common.engine.pipeline_layers import first_and_last_differ
from common.engine.transformer_engine import fp8_options
from common.engine.versions import installed_engine
from common.model.kernels.selection import Kernels, select_kernels, with_working_kernels
from common.model.layers.exchange import set_exchange
from common.model.layers.gpt import QwenModel
from common.model.layers.layer_spec import block_spec
from common.model.layers.lora import add_adapters
from common.model.layers.residual_norm import TorchNorms, connect_norms, set_norms
from common.model.shape.config import QwenConfig
from common.model.shape.options import ModelOptions
from common.model.shape.rope import yarn_frequencies
from common.parallel import ParallelSizes
from common.platforms.base import Platform

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform
) -> TransformerConfig:
    """Megatron-Core's TransformerConfig of `qwen` at these parallel sizes."""
    dtype = DTYPES[options.precision]
    fused = platform.fused_kernels
    engine = options.transformer_impl == "transformer_engine"
    return _with_overrides(
        options.mcore,
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
        # With VPP at PP=2, batched sends swap the tensors from the two neighbours, without an error.
        overlap_p2p_comm=sizes.vpp > 1,
        batch_p2p_comm=sizes.vpp == 1,
        # With VPP, Megatron-Core frees an output before its send is complete: over gloo the next stage then trained on
        # overwritten data (first loss 5.998 instead of 5.979).
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
        tp_comm_overlap=options.tp_comm_overlap == "true",
        deterministic_mode=options.deterministic,
        # The fused kernel supports neither packed sequences nor a norm between split and rotation.
        **single_qkv_rope(fused and not options.packed_sequences and not qwen.qk_norm),
        **fp8_options(options.fp8_format, options.fp8_recipe),
        **_recompute(options),
    )


def _with_overrides(mcore: tuple[str, ...], **fields: Any) -> TransformerConfig:
    """The config of `fields` with the overrides in `mcore`; raises KitError if Megatron-Core refuses them."""
    with named_refusals(mcore):
        return TransformerConfig(**{**fields, **overrides(mcore)["transformer"]})


def pipeline_options(chunk_layers: tuple[int, ...], vpp: int) -> dict[str, Any]:
    """TransformerConfig's fields for these numbers of layers, one per chunk in model order; none if all are equal.

    Every version has fields for the first and the last stage; from 0.13 on there is a layout for all chunks.
    """
    if len(set(chunk_layers)) == 1:
        return {}
    if first_and_last_differ(chunk_layers, vpp):
        # 0.11 divides by the number of stages that have no field of their own.
        last = {"num_layers_in_last_pipeline_stage": chunk_layers[-1]} if len(chunk_layers) > 2 else {}
        return {"num_layers_in_first_pipeline_stage": chunk_layers[0], **last}
    stages = [["decoder"] * num_layers for num_layers in chunk_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return {"pipeline_model_parallel_layout": stages}


def _recompute(options: ModelOptions) -> dict[str, Any]:
    """TransformerConfig's fields for RECOMPUTE: none, core attention (selective), or layers (full)."""
    if options.recompute == "full" and options.recompute_num_layers:
        layers = options.recompute_num_layers
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}
    if options.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective"} if options.recompute == "selective" else {}


def build_model(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform, seq_length: int
) -> list[torch.nn.Module]:
    """The chunks of this rank, on its device, with random weights; in bf16 wrapped in Float16Module.

    A collective call: all ranks test the optional kernels together, and use the same ones.
    """
    platform = with_working_kernels(platform, options)
    config = transformer_config(qwen, sizes, options, platform)
    kernels = select_kernels(qwen, sizes, options, platform)
    chunks: list[torch.nn.Module] = []
    with weight_gradient_fusion(chunks):
        chunks += [_chunk(config, qwen, sizes, options, kernels, seq_length, i) for i in range(sizes.vpp)]
    if platform.device == "cuda":
        chunks = [chunk.cuda(torch.cuda.current_device()) for chunk in chunks]
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else chunks


def _chunk(
    config: TransformerConfig,
    qwen: QwenConfig,
    sizes: ParallelSizes,
    options: ModelOptions,
    kernels: Kernels,
    seq_length: int,
    index: int,
) -> torch.nn.Module:
    chunk = index * sizes.pp + parallel_state.get_pipeline_model_parallel_rank()
    num_layers = qwen.chunk_layers(sizes.pp, sizes.vpp, sizes.pipeline_layers)[chunk]
    first, last, more = installed_engine().chunk_place(index, sizes.vpp)
    model = QwenModel(
        num_tokens=qwen.vocab_size,
        loss_kernels=kernels.loss,
        per_token_gradients=options.per_token_gradients,
        config=config,
        transformer_layer_spec=block_spec(
            options.transformer_impl,
            num_layers,
            qwen.qk_norm,
            kernels.core_attention,
            fused_residual_norms=kernels.norms is not None,
            products=kernels.products,
            exchanging=kernels.exchange is not None,
            lora=options.lora,
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
    if options.deterministic and first:
        # Megatron-Core's deterministic mode indexes the weight, and the backward pass of indexing accumulates a token's
        # gradients in bf16 (indexing_backward_kernel in ATen's Indexing.cu), where 256 + 1 is 256. F.embedding sorts
        # them and accumulates in float32, in a fixed order in deterministic mode (embedding_backward_cuda_kernel).
        model.embedding.word_embeddings.deterministic_mode = False
    set_exchange(model.decoder, kernels.exchange)
    set_norms(model.decoder, kernels.norms or TorchNorms())
    if kernels.norms:
        connect_norms(model.decoder, across_layers=options.recompute != "full")
    if qwen.yarn:
        frequencies = yarn_frequencies(qwen.yarn, qwen.head_dim, qwen.rope_theta)
        model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq.device)
    if options.lora:
        add_adapters(model, options.lora, qwen, options.seed)
    return model


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside the wrappers of data parallelism and precision."""
    while hasattr(module, "module"):
        module = module.module  # type: ignore[assignment]
    return module
