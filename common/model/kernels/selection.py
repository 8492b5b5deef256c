"""Selection of the kernels that a model is built with on this rank's device; logged before it is built.

Optional kernels are tested by `common.model.probe`. One that fails in any way on any rank is used on none, with one
line in the log, or ends the run on all ranks if a setting requires it. Therefore each rank runs the same tests in the
same order, even if its stage does not use the kernel.

All of these except attention are deterministic, so DETERMINISTIC=true changes none of them. Triton's kernels use
neither atomics nor autotuning (a norm's weight gradient has a fixed number of partial sums). QuACK's (0.6.5) are called
with fixed tiles and without split-K, so that one block computes each element under the dynamic scheduler too, and each
chunk of the loss is accumulated once (gemm_sm90.py, lce_glue in linear_cross_entropy.py). The tests check that repeated
runs give the same bits.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from torch.nn.functional import silu

from common.engine.patches import fuse_rotary_embedding, use_kernels
from common.engine.versions import installed_engine
from common.errors import KitError
from common.log import logger
from common.model.kernels import peer_copies
from common.model.kernels.quack_products import QuackProducts
from common.model.layers import gated_mlp
from common.model.layers.attention import KINDS, SdpaAttention, select_core_attention
from common.model.layers.exchange import Exchange
from common.model.layers.gated_mlp import GatedProducts
from common.model.layers.loss import TorchKernels
from common.model.layers.residual_norm import Norms
from common.model.probe import PROBED, find_fault, need, try_on_all_ranks
from common.model.shape.config import QwenConfig
from common.model.shape.options import ModelOptions
from common.parallel import ParallelSizes
from common.platforms.base import Platform

Part = TypeVar("Part")


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model that replace Megatron-Core's."""

    core_attention: type[SdpaAttention] | None  # None: Transformer Engine's
    products: GatedProducts | None  # the MLP's GEMMs with fused SwiGLU; None: unfused
    norms: Norms | None  # RMSNorm fused with the residual add before it; None: unfused
    loss: Any  # the kernels of LinearCrossEntropy
    exchange: Exchange | None = None  # overlaps tensor parallel communication with GEMMs; None: Megatron-Core's


def with_working_kernels(platform: Platform, options: ModelOptions) -> Platform:
    """`platform`, without fused kernels if Triton's fail on any rank; otherwise patches them into Megatron-Core.

    A collective call; raises KitError if the options require fused products, which need them.
    """
    if not platform.fused_kernels:
        return platform
    found, failure = try_on_all_ranks(lambda: _triton_kernels(_device(platform)))
    if found:
        use_kernels(*found)
        if options.transformer_impl == "local":
            fuse_rotary_embedding()
        return platform
    if options.fused_products == "true":
        raise _no_fused_products("SwiGLU and loss", f"Triton: {failure}")
    logger.info("Triton kernels: not used, PyTorch's and Megatron-Core's are slower (%s)", failure)
    return replace(platform, fused_kernels=False)


def _triton_kernels(device: torch.device) -> tuple[Any, Any]:
    from common.model.kernels.qkv_rope import split_and_rotate  # these import triton, which may be missing
    from common.model.kernels.swiglu import bias_swiglu

    need(_swiglu_fault(bias_swiglu, device))  # tests Triton itself too, for all of them
    return bias_swiglu, split_and_rotate


def _swiglu_fault(swiglu: Callable[[torch.Tensor, None], torch.Tensor], device: torch.device) -> str:
    inputs = torch.randn(PROBED, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)

    def results(function: Callable[[torch.Tensor, None], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        out = function(x.requires_grad_(), None)
        return [out.detach(), *torch.autograd.grad(out.sum(), x)]

    def reference(gate_and_up: torch.Tensor, _: None) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, 1)
        return silu(gate) * up

    return find_fault(lambda: results(swiglu, inputs.clone()), lambda: results(reference, inputs.float()))


def select_kernels(qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform) -> Kernels:
    """The fastest kernels that work on all ranks. A collective call.

    Raises KitError if the options require one that does not.
    """
    norms = fused_residual_norms(options, platform)
    kernels = Kernels(
        core_attention=core_attention(qwen, sizes, options, platform),
        products=mlp_products(qwen, sizes, options, platform, norms),
        norms=norms,
        loss=loss_kernels(qwen, sizes, options, platform),
        exchange=tp_exchange(qwen, sizes, options, platform, norms),
    )
    if options.deterministic:
        assert torch.are_deterministic_algorithms_enabled(), "set deterministic mode before kernels are selected"
        logger.info("deterministic: %s", "; ".join(deterministic_replacements(kernels.core_attention, platform)))
    return kernels


def deterministic_replacements(attention: type[SdpaAttention] | None, platform: Platform) -> list[str]:
    """What a deterministic run uses instead of the defaults, for the log."""
    if platform.device == "cpu":
        return ["torch's deterministic algorithms, the default on a CPU"]
    if attention is None:
        kernel = "Transformer Engine's attention without its non-deterministic kernels"
    elif attention is SdpaAttention:
        kernel = "PyTorch's attention without cuDNN's"
    else:
        kernel = "attention gradients accumulated in a fixed order, without atomics"
    embedding = "embedding gradients sorted and accumulated in a fixed order"
    return [kernel, embedding, "NCCL's ring algorithm only", "cuBLAS workspaces of a fixed size"]


def core_attention(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform
) -> type[SdpaAttention] | None:
    """The core attention of each layer; None: Transformer Engine's own.

    That exchanges keys and values in a ring under context parallelism, but not those of rows of several documents.
    Gathered for a faster kernel, they are faster than its ring too (docs/benchmarks.md, "Several GPUs").
    """
    auto, chunked = options.core_attention == "auto", sizes.cp > 1
    engine = options.transformer_impl == "transformer_engine" and not (chunked and options.separate_documents)
    if options.packed_sequences:
        return None
    if options.precision == "fp32":
        return None if engine and not chunked else SdpaAttention  # flash_attn has no float32
    preferred = platform.core_attention if auto else (options.core_attention,)
    if engine and auto:
        preferred = tuple(kind for kind in preferred if KINDS[kind].faster_than_engine)
        if not preferred:
            return None
    heads = (qwen.num_attention_heads // sizes.tp, qwen.num_key_value_heads // sizes.tp, qwen.head_dim)
    return select_core_attention(preferred, heads, _device(platform), engine=engine and auto, chunked=chunked)


def fused_residual_norms(options: ModelOptions, platform: Platform) -> Norms | None:
    """The fused residual norms; None with TP_COMM_OVERLAP=true, whose norms are Transformer Engine's.

    With FP8 too: at Qwen's widths its norm that writes FP8 takes longer than these and a cast (docs/benchmarks.md).
    """
    if options.tp_comm_overlap == "true" or not (platform.fused_kernels and installed_engine().fused_residual_norms):
        return None
    norms, failure = try_on_all_ranks(_triton_norms)
    if failure:
        logger.info("norms: not fused with the residual adds (Triton: %s)", failure)
    return norms


def _triton_norms() -> Norms:
    from common.model.kernels.norm_kernels import TritonNorms  # imports triton, which may be missing

    return TritonNorms()


def mlp_products(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform, norms: Norms | None
) -> GatedProducts | None:
    """The MLP's GEMMs with fused SwiGLU; None: Megatron-Core's linear layers.

    norms: None if Transformer Engine's linear layer normalizes its input itself, and therefore has to be called.
    """
    engine = options.transformer_impl == "transformer_engine"
    if not _may_fuse(options, platform):
        return None
    reasons = {
        "FP8's are Transformer Engine's": options.fp8_format != "none",
        "an adapter adds to what is between the two": options.lora is not None and options.lora.adapts_mlp,
        "with Transformer Engine's layers it needs the fused residual norms": engine and norms is None,
    }
    if reason := _first(reasons):
        if options.fused_products == "true":
            raise _no_fused_products("SwiGLU", reason)
        logger.info("SwiGLU: not fused into matrix products (%s)", reason)
        return None
    sizes_here = qwen.hidden_size, qwen.intermediate_size // sizes.tp, _device(platform)

    def attempt() -> QuackProducts:
        _need_hopper(sizes_here[2])
        products = QuackProducts()
        need(gated_mlp.unusable_reason(products, *sizes_here))
        return products

    return _fused("SwiGLU", attempt, options)


def tp_exchange(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform, norms: Norms | None
) -> Exchange | None:
    """The communication of the layers beside their GEMMs; None: before and after them, or Transformer Engine's."""
    if sizes.tp == 1 or options.tp_comm_overlap != "auto" or not platform.fused_kernels:
        return None
    reasons = {
        "SEQUENCE_PARALLEL=false": not options.sequence_parallel,
        f"PRECISION={options.precision}": options.precision != "bf16",
        "FP8's products are Transformer Engine's: TP_COMM_OVERLAP=true": options.fp8_format != "none",
        "Transformer Engine's layers need the fused residual norms for it": options.transformer_impl != "local"
        and norms is None,
        f"TP={sizes.tp} spans nodes": int(os.environ.get("LOCAL_WORLD_SIZE", "1")) % sizes.tp > 0,
    }
    group = parallel_state.get_tensor_model_parallel_group
    reason = (
        _first(reasons)
        or try_on_all_ranks(peer_copies.need_peers)[1]
        or try_on_all_ranks(lambda: need(peer_copies.unusable_reason(group(), qwen.hidden_size)))[1]
    )
    if reason:
        logger.info("TP communication: not overlapped with matrix products (%s)", reason)
        return None
    logger.info("TP communication: overlapped with matrix products, by the GPUs' copy engines")
    return peer_copies.PeerCopies(group())


def loss_kernels(qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform) -> Any:
    """The kernels of the output layer and its loss."""
    if not platform.fused_kernels:
        return TorchKernels()
    triton, failure = try_on_all_ranks(_triton_loss)
    if failure:
        logger.info("loss: PyTorch (Triton: %s)", failure)
    unfused = triton or TorchKernels()
    if not _may_fuse(options, platform):
        return unfused
    reasons = {
        f"TP={sizes.tp} divides the softmax": sizes.tp > 1,
        "loss weights other than 0 and 1": options.weighted,
        "preferences need the gradient of each token": options.per_token_gradients,
    }
    if reason := _first(reasons):
        logger.info("loss: not fused into matrix products (%s)", reason)
        return unfused

    def attempt() -> Any:
        _need_hopper(device)
        from common.model.kernels.quack_loss import QuackLoss, unusable_reason  # imports triton too

        loss = QuackLoss()
        need(unusable_reason(loss, qwen.hidden_size, qwen.vocab_size, device))
        return loss

    device = _device(platform)
    is_last = parallel_state.get_pipeline_model_parallel_rank() == sizes.pp - 1  # other stages have no loss
    return _fused("loss", attempt if is_last else lambda: unfused, options) or unfused


def _first(reasons: dict[str, bool]) -> str:
    """The first of `reasons` that holds; empty if none does."""
    return next((reason for reason, holds in reasons.items() if holds), "")


def _triton_loss() -> Any:
    from common.model.kernels.loss_kernels import TritonKernels  # imports triton, which may be missing

    return TritonKernels()


def _may_fuse(options: ModelOptions, platform: Platform) -> bool:
    return options.fused_products != "false" and options.precision == "bf16" and platform.fused_kernels


def _need_hopper(device: torch.device) -> None:
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    need("" if is_hopper else "it needs a Hopper GPU")


def _fused(what: str, attempt: Callable[[], Part], options: ModelOptions) -> Part | None:
    """The result of `attempt`, QuACK's fused GEMMs, if it succeeds on all ranks, and logs it; otherwise None.

    Raises KitError if it fails and the options require it.
    """
    part, failure = try_on_all_ranks(attempt)
    if not failure:
        logger.info("%s: fused into matrix products (QuACK)", what)
        return part
    if options.fused_products == "true":
        raise _no_fused_products(what, failure)
    logger.info("%s: not fused into matrix products (QuACK: %s)", what, failure)
    return None


def _no_fused_products(what: str, failure: str) -> KitError:
    return KitError(
        f"FUSED_PRODUCTS=true, but QuACK cannot fuse {what} into matrix products here: {failure}; set it to auto, or"
        " install requirements/hopper.txt"
    )


def _device(platform: Platform) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if platform.device == "cuda" else torch.device("cpu")
