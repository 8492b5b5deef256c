"""What each part of a model is computed by on this rank's device: found out, and logged, before it is built.

What is optional is tried by `common.model.probe`: it fails in any way on any rank, and is passed over on all of them
with one line, or ends the run on all of them where a setting asks for it. So each rank makes the same trials in the
same order, also one that has no such part.

Of these all but attention add in one order in every run, so that they stay as they are where a run is to be
deterministic: Triton's have neither atomic adds nor autotuning (partial sums of a norm's weight are as many as the GPU
has multiprocessors), and QuACK's 0.6.5 are called with their tiles and without splitting K, where each element is of
one block, whoever takes it (dynamic_scheduler), and each chunk of the loss is added once (gemm_sm90.py, lce_glue in
linear_cross_entropy.py). The trials see whether bits are the same.
"""

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
from common.model.kernels.quack_products import QuackProducts
from common.model.layers import gated_mlp
from common.model.layers.attention import KINDS, SdpaAttention, choose
from common.model.layers.gated_mlp import GatedProducts
from common.model.layers.loss import TorchKernels
from common.model.layers.residual_norm import Norms
from common.model.probe import PROBED, find_fault, need, tried
from common.model.shape.config import QwenConfig
from common.model.shape.options import ModelOptions
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


def with_working_kernels(platform: Platform, options: ModelOptions) -> Platform:
    """`platform`, without fused kernels where Triton's do not work on some rank; else they are put into Megatron-Core.

    A collective call; raises KitError where the options ask for products that rest on them.
    """
    if not platform.fused_kernels:
        return platform
    found, failure = tried(lambda: _triton_kernels(_device(platform)))
    if found:
        use_kernels(*found)
        if options.transformer_impl == "local":
            fuse_rotary_embedding()
        return platform
    if options.fused_products == "true":
        raise _no_fused_products("SwiGLU and loss", f"Triton: {failure}")
    logger.info("Triton's kernels: passed over, PyTorch's and Megatron-Core's own are slower (%s)", failure)
    return replace(platform, fused_kernels=False)


def _triton_kernels(device: torch.device) -> tuple[Any, Any]:
    from common.model.kernels.qkv_rope import split_and_rotate  # these import triton, which is not everywhere
    from common.model.kernels.swiglu import bias_swiglu

    need(_swiglu_fault(bias_swiglu, device))  # the others are compiled by the same Triton
    return bias_swiglu, split_and_rotate


def _swiglu_fault(swiglu: Callable[[torch.Tensor, None], torch.Tensor], device: torch.device) -> str:
    given = torch.randn(PROBED, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)

    def results(by: Callable[[torch.Tensor, None], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        out = by(x.requires_grad_(), None)
        return [out.detach(), *torch.autograd.grad(out.sum(), x)]

    def exactly(gate_and_up: torch.Tensor, _: None) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, 1)
        return silu(gate) * up

    return find_fault(lambda: results(swiglu, given.clone()), lambda: results(exactly, given.float()))


def select_kernels(qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform) -> Kernels:
    """The fastest that work and are right here, the same on all ranks. A collective call.

    Raises KitError where the options ask for one that does not.
    """
    norms = fused_residual_norms(options, platform)
    kernels = Kernels(
        core_attention=core_attention(qwen, sizes, options, platform),
        products=mlp_products(qwen, sizes, options, platform, norms),
        norms=norms,
        loss=loss_kernels(qwen, sizes, options, platform),
    )
    if options.deterministic:
        assert torch.are_deterministic_algorithms_enabled(), "its kernels were chosen as if any would do"
        logger.info("deterministic: %s", "; ".join(_in_place(kernels.core_attention, platform)))
    return kernels


def _in_place(attention: type[SdpaAttention] | None, platform: Platform) -> list[str]:
    """What a deterministic run takes in the place of what."""
    if platform.device == "cpu":
        return ["torch's deterministic algorithms, which a CPU takes anyway"]
    if attention is None:
        way = "Transformer Engine's attention without its non-deterministic kernels"
    elif attention is SdpaAttention:
        way = "PyTorch's attention without cuDNN's"
    else:
        way = "attention gradients added in a fixed order of blocks, not as they come"
    embedding = "embedding gradients sorted first, not added as they come"
    return [way, embedding, "NCCL's rings, not its fastest", "cuBLAS's fixed workspaces"]


def core_attention(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform
) -> type[SdpaAttention] | None:
    """What attends in each layer; None: Transformer Engine's layers keep their own."""
    engine = options.transformer_impl == "transformer_engine"
    if options.precision == "fp32" or options.packed_sequences or sizes.cp > 1:
        return None if engine else SdpaAttention  # flash_attn has no float32; the others go by bounds and ranks
    told = options.core_attention
    preferred = platform.core_attention if told == "auto" else (told,)
    if engine and told == "auto":
        preferred = tuple(kind for kind in preferred if KINDS[kind].before_engine)
        if not preferred:
            return None
    heads = (qwen.num_attention_heads // sizes.tp, qwen.num_key_value_heads // sizes.tp, qwen.head_dim)
    return choose(preferred, heads, _device(platform), engine=engine and told == "auto")


def fused_residual_norms(options: ModelOptions, platform: Platform) -> Norms | None:
    """The fused residual norms; None where Transformer Engine fuses norm and product for FP8 or TP overlap."""
    plain = options.fp8_format == "none" and not options.tp_comm_overlap
    if not (platform.fused_kernels and installed_engine().fused_residual_norms and plain):
        return None
    norms, failure = tried(_triton_norms)
    if failure:
        logger.info("norms: separate from the residual sums (Triton: %s)", failure)
    return norms


def _triton_norms() -> Norms:
    from common.model.kernels.norm_kernels import TritonNorms  # imports triton, which is not everywhere

    return TritonNorms()


def mlp_products(
    qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform, norms: Norms | None
) -> GatedProducts | None:
    """What multiplies in each layer's MLP with SwiGLU inside; None: linear layers, as Megatron-Core has them.

    norms: None where Transformer Engine's linear layer norms its input itself, and has to be called.
    """
    engine = options.transformer_impl == "transformer_engine"
    if not _may_fuse(options, platform):
        return None
    if engine and norms is None:
        if options.fused_products == "true":
            raise _no_fused_products("SwiGLU", "Transformer Engine's layers need norms of ours for it")
        return None
    sizes_here = qwen.hidden_size, qwen.intermediate_size // sizes.tp, _device(platform)

    def attempt() -> QuackProducts:
        _need_hopper(sizes_here[2])
        products = QuackProducts()
        need(gated_mlp.why_not(products, *sizes_here))
        return products

    return _fused("SwiGLU", attempt, options)


def loss_kernels(qwen: QwenConfig, sizes: ParallelSizes, options: ModelOptions, platform: Platform) -> Any:
    """What the output layer and its loss are computed by."""
    if not platform.fused_kernels:
        return TorchKernels()
    triton, failure = tried(_triton_loss)
    if failure:
        logger.info("loss: by PyTorch (Triton: %s)", failure)
    beside = triton or TorchKernels()
    if not _may_fuse(options, platform) or sizes.tp > 1 or options.weighted:
        return beside

    def attempt() -> Any:
        _need_hopper(device)
        from common.model.kernels.quack_loss import QuackLoss, why_not  # imports triton too

        loss = QuackLoss()
        need(why_not(loss, qwen.hidden_size, qwen.vocab_size, device))
        return loss

    device = _device(platform)
    is_last = parallel_state.get_pipeline_model_parallel_rank() == sizes.pp - 1  # the others have no loss to try
    return _fused("loss", attempt if is_last else lambda: beside, options) or beside


def _triton_loss() -> Any:
    from common.model.kernels.loss_kernels import TritonKernels  # imports triton, which is not everywhere

    return TritonKernels()


def _may_fuse(options: ModelOptions, platform: Platform) -> bool:
    return options.fused_products != "false" and options.precision == "bf16" and platform.fused_kernels


def _need_hopper(device: torch.device) -> None:
    there = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    need("" if there else "it is made for Hopper GPUs")


def _fused(what: str, attempt: Callable[[], Part], options: ModelOptions) -> Part | None:
    """What QuACK brings, where `attempt` gives it on all ranks; which and why not is logged.

    Else None, or KitError if the options ask for it.
    """
    part, failure = tried(attempt)
    if not failure:
        logger.info("%s: inside matrix products, by QuACK", what)
        return part
    if options.fused_products == "true":
        raise _no_fused_products(what, failure)
    logger.info("%s: beside matrix products (QuACK: %s)", what, failure)
    return None


def _no_fused_products(what: str, failure: str) -> KitError:
    return KitError(
        f"FUSED_PRODUCTS=true, and QuACK has no {what} inside matrix products here: {failure}; set it to auto, or"
        " install requirements/hopper.txt"
    )


def _device(platform: Platform) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if platform.device == "cuda" else torch.device("cpu")
