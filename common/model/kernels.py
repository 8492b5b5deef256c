"""What each part of a model is computed by on this rank's device: found out, and logged, before it is built."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state

from common.errors import KitError
from common.log import logger
from common.mcore import fuse_rotary_embedding, joins_norms, use_kernels
from common.model import gated_mlp
from common.model.attention import KINDS, SdpaAttention, choose
from common.model.config import QwenConfig
from common.model.gated_mlp import GatedProducts
from common.model.joined_norm import Norms
from common.model.loss import TorchKernels
from common.model.options import ModelOptions
from common.model.quack_products import QuackProducts
from common.parallel import ParallelSizes
from common.platforms.base import Platform

Part = TypeVar("Part")


@dataclass(frozen=True)
class Kernels:
    """What is put into a model in place of Megatron-Core's own."""

    core_attention: type[SdpaAttention] | None  # None: Transformer Engine's
    products: GatedProducts | None  # of the MLP; None: linear layers with SwiGLU between them
    norms: Norms | None  # joined with the sums before them; None: apart
    loss: Any  # what LinearCrossEntropy computes by


def choose_kernels(qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform) -> Kernels:
    """The fastest that work and are right here; also puts SwiGLU's and QKV's into Megatron-Core.

    Raises KitError where the options ask for one that does not.
    """
    if platform.fused_kernels:
        _put_into_megatron(options.transformer_impl)
    norms = joined_norms(options, platform)
    return Kernels(
        core_attention=core_attention(qwen, sizes, options, platform),
        products=mlp_products(qwen, sizes, options, platform, norms),
        norms=norms,
        loss=loss_kernels(qwen, sizes, options, platform),
    )


def _put_into_megatron(transformer_impl: str) -> None:
    from common.model.qkv_rope import split_and_rotate  # these import triton, which is not everywhere
    from common.model.swiglu import bias_swiglu

    use_kernels(bias_swiglu, split_and_rotate)
    if transformer_impl == "local":
        fuse_rotary_embedding()


def core_attention(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform
) -> type[SdpaAttention] | None:
    """What attends in each layer; None: Transformer Engine's layers keep their own."""
    engine = options.transformer_impl == "transformer_engine"
    if options.precision == "fp32" or options.joins_rows or sizes.cp > 1:
        return None if engine else SdpaAttention  # flash_attn has no float32; the others go by bounds and ranks
    told = options.core_attention
    preferred = platform.core_attention if told == "auto" else (told,)
    if engine and told == "auto":
        preferred = tuple(kind for kind in preferred if KINDS[kind].before_engine)
        if not preferred:
            return None
    heads = (qwen.num_attention_heads // sizes.tp, qwen.num_key_value_heads // sizes.tp, qwen.head_dim)
    return choose(preferred, heads, _device(platform), engine=engine and told == "auto")


def joined_norms(options: ModelOptions, platform: Platform) -> Norms | None:
    """Norms of sums as they are added: not where Transformer Engine joins norm and product to a purpose."""
    apart = options.fp8_format == "none" and not options.tp_comm_overlap
    if not (platform.fused_kernels and joins_norms() and apart):
        return None
    from common.model.norm_kernels import TritonNorms  # imports triton, which is not everywhere

    return TritonNorms()


def mlp_products(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform, norms: Norms | None
) -> GatedProducts | None:
    """What multiplies in each layer's MLP with SwiGLU inside; None: linear layers, as Megatron-Core has them.

    norms: None where Transformer Engine's linear layer norms its input itself, and has to be called.
    """
    engine = options.transformer_impl == "transformer_engine"
    if not _may_fuse(options, platform) or (engine and norms is None):
        return None
    sizes_here = qwen.hidden_size, qwen.intermediate_size // sizes.tp, _device(platform)
    return _fused("SwiGLU", QuackProducts, lambda it: gated_mlp.why_not(it, *sizes_here), options, sizes_here[2])


def loss_kernels(qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform) -> Any:
    """What the output layer and its loss are computed by."""
    if not platform.fused_kernels:
        return TorchKernels()
    from common.model.loss_kernels import TritonKernels  # these import triton, which is not everywhere
    from common.model.quack_loss import QuackLoss, why_not

    is_last = parallel_state.get_pipeline_model_parallel_rank() == sizes.pp - 1  # the others have no loss to try
    if not (is_last and _may_fuse(options, platform)) or sizes.tp > 1 or options.weighted:
        return TritonKernels()
    device = _device(platform)
    found = _fused("loss", QuackLoss, lambda loss: why_not(loss, qwen.hidden_size, qwen.vocab_size, device), options,
                   device)  # fmt: skip
    return found or TritonKernels()


def _may_fuse(options: ModelOptions, platform: Platform) -> bool:
    return options.fused_products != "false" and options.precision == "bf16" and platform.fused_kernels


def _fused(
    what: str, made: Callable[[], Part], why_not: Callable[[Part], str], options: ModelOptions, device: torch.device
) -> Part | None:
    """What QuACK brings, where it is installed, works on `device` and is right; which and why not is logged.

    Else None, or KitError if the options ask for it.
    """
    failure = "it is made for Hopper GPUs"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        try:
            part = made()
            failure = why_not(part)
        except ModuleNotFoundError as error:
            failure = f"no module {error.name}"
        if not failure:
            logger.info("%s: inside matrix products, by QuACK", what)
            return part
    if options.fused_products == "true":
        raise KitError(
            f"FUSED_PRODUCTS=true, and QuACK has no {what} inside matrix products here: {failure}; set it to auto, or"
            " install requirements/hopper.txt"
        )
    logger.info("%s: beside matrix products (QuACK: %s)", what, failure)
    return None


def _device(platform: Platform) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if platform.device == "cuda" else torch.device("cpu")
