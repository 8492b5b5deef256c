"""Seconds per step: the work of a stage at the data sheet's rates, times fitted factors.

Letters as in activations.py. Nothing here was measured on more than four GPUs: link bandwidths are assumed.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.estimate.activations import Workload, recomputed_layers
from common.estimate.constants import (
    EXCHANGE_SHARE,
    FP8_PRODUCTS,
    HOST_BYTES_PER_SECOND,
    LINK_BYTES_PER_SECOND,
    NETWORK_BYTES_PER_SECOND,
    SECONDS,
)
from common.estimate.gpus import Gpu
from common.estimate.memory import trained_parameters
from common.estimate.weights import GRADIENT_BYTES, Chunk, Chunks, adam_bytes, chunk_parameters, chunks_of_ranks
from common.model.shape.lora import adapter_parameters
from common.training.settings import TrainSettings
from common.training.settings.optimizer import OFFLOADED

Cost = dict[str, float]


def add(*costs: Cost) -> Cost:
    """The sum of costs, name by name."""
    if len(costs) == 1:
        return costs[0]
    names = dict.fromkeys(name for cost in costs for name in cost)  # a fixed order, so that sums are reproducible
    return {name: sum(cost.get(name, 0.0) for cost in costs) for name in names}


def seconds(cost: Cost) -> float:
    """The seconds that a GPU takes for `cost`."""
    return sum(SECONDS[name] * amount for name, amount in cost.items())


def layer_cost(work: Workload, recompute: str, gpu: Gpu) -> Cost:
    """Forward and backward pass of one layer for one micro-batch: seconds at full rates, and number of layers.

    recompute: of this layer, since with full the others of a chunk may not be recomputed.
    A GEMM's backward pass costs twice its forward pass. Attention counts its causal half, and is slower with heads
    smaller than 128. Traffic is what norms, SwiGLU, RoPE and residual adds read and write, each tensor once per pass.
    """
    qwen, tokens = work.qwen, work.tokens
    h, q = qwen.hidden_size, qwen.num_attention_heads * qwen.head_dim
    products = 2 * tokens * (h * (qwen.qkv_rows + q) + 3 * h * qwen.intermediate_size) / work.tp
    attention = 2 * tokens * work.seq_length * q / work.tp * max(1.0, 128 / qwen.head_dim)
    rope = 0 if work.transformer_engine else 12 * (work.query_bytes + work.key_bytes)
    traffic = (0 if work.fused_products else 8 * work.mlp_bytes) + 30 * work.residual_bytes + rope
    passes, attention_passes, traffic_passes = {"none": (3, 3, 1.0), "selective": (3, 4, 1.0), "full": (4, 4, 4 / 3)}[
        recompute
    ]
    adapters = 0.0
    if work.lora:  # frozen weights have no gradient; adapters read and write what the layers put out
        adapters = passes * 2 * tokens * adapter_parameters(work.lora, qwen, work.tp)
        passes -= 1
        outputs = 2 * work.mlp_bytes + work.query_bytes + 2 * work.key_bytes + 2 * work.hidden_bytes
        traffic += 2 * 2 * outputs
    return {
        "products": (FP8_PRODUCTS.get(work.fp8_recipe, 1.0) * passes * products + adapters) / gpu.flops,
        attention_name(work): attention_passes * attention / gpu.flops,
        "traffic": traffic_passes * traffic / gpu.bandwidth,
        "layers of a micro-batch": passes / 3,
    }


def attention_name(work: Workload) -> str:
    """The name of attention in the costs: FlashAttention 4 with the fused products, but not for packed sequences."""
    return "FlashAttention 4" if work.fused_products and not work.separate else "attention"


def chunk_costs(work: Workload, chunks: Iterable[Chunk], gpu: Gpu) -> dict[Chunk, Cost]:
    """Forward and backward pass of each of `chunks` for one micro-batch.

    With reading weights and accumulating gradients.
    """
    twice = layer_cost(work, work.recompute, gpu)
    once = layer_cost(work, "none", gpu) if work.recompute == "full" else twice
    return {chunk: _chunk_cost(work, chunk, gpu, once, twice) for chunk in chunks}


def _chunk_cost(work: Workload, chunk: Chunk, gpu: Gpu, once: Cost, twice: Cost) -> Cost:
    """As `chunk_costs`; once: of a layer that is not recomputed, twice: of one that is."""
    parameters, recomputed = chunk_parameters(work.qwen, work.tp, chunk), recomputed_layers(work, chunk)
    total = {
        **{name: recomputed * twice[name] + (chunk.num_layers - recomputed) * once[name] for name in once},
        "weights": _weight_bytes(work) * parameters / gpu.bandwidth,
    }
    if chunk.last:
        rows = work.qwen.padded_vocab_size(work.tp) / work.tp
        logits = work.tokens * rows
        passes = (2 if work.lora else 3) + work.recomputed_loss
        total["products"] += passes * 2 * logits * work.qwen.hidden_size / gpu.flops
        times = 1 if work.fused_loss else 3
        total["traffic"] += times * work.element_bytes * logits / gpu.bandwidth
    return total


def _weight_bytes(work: Workload) -> int:
    """Bytes moved for a weight in a micro-batch: read by each product, and its gradient added to; frozen: only read."""
    return 2 * work.element_bytes if work.lora else 3 * work.element_bytes + 2 * GRADIENT_BYTES


def step_cost(work: Workload, num_layers: int, parameters: int, gpu: Gpu, shards: int) -> Cost:
    """What a rank does once per step: zeroing gradients, their norm, clipping, Adam; and host time per layer.

    parameters: those of its `num_layers` that have gradients, the vocabulary's included.
    """
    # zeroing and gathering: all parameters; norm, clipping and Adam (3 and 7 accesses of 4 bytes): the rank's shard
    moved = (GRADIENT_BYTES + work.element_bytes) * parameters + (3 * 4 + 7 * 4) * parameters / shards
    return {"weights": moved / gpu.bandwidth, "layers of a step": num_layers}


def tensor_parallel_seconds(work: Workload, num_layers: int) -> float:
    """Seconds of tensor-parallel collectives: four forward, six backward of e n h bytes per layer.

    Source: arXiv 2205.05198, section 4.2.2, and the all-gathers repeated for the weight gradients.
    """
    share = EXCHANGE_SHARE if work.exchanging else 1.0
    return share * 10 * num_layers * work.hidden_bytes * (work.tp - 1) / work.tp / LINK_BYTES_PER_SECOND


def context_parallel_seconds(settings: TrainSettings, work: Workload, num_layers: int) -> float:
    """Seconds of gathering keys and values, again where attention is computed again, and of reducing their gradients.

    Not overlapped; Transformer Engine's ring is assumed to be.
    """
    if not work.gathered:
        return 0.0
    within_node = settings.tp * settings.cp <= settings.gpus
    rate = LINK_BYTES_PER_SECOND if within_node else NETWORK_BYTES_PER_SECOND
    passes = 2 if work.recompute == "none" else 3
    return passes * num_layers * 2 * work.key_bytes * (work.cp - 1) / rate


def pipeline_seconds(settings: TrainSettings, work: Workload) -> float:
    """Seconds of a stage's sends for a micro-batch: of each chunk, hidden states and their gradient, not overlapped.

    The other direction's come at the same time. More chunks send more often, which limits what VPP gains.
    """
    if settings.pp == 1:
        return 0.0
    rate = LINK_BYTES_PER_SECOND if settings.nnodes == 1 else NETWORK_BYTES_PER_SECOND
    return 2 * settings.vpp * work.residual_bytes / rate


def data_parallel_seconds(settings: TrainSettings, work: Workload, parameters: int, backward: float) -> float:
    """Seconds of gradient reduction and parameter gathering that do not overlap with the last backward pass."""
    dp = settings.sizes.dp * settings.sizes.cp
    rate = LINK_BYTES_PER_SECOND if settings.nnodes == 1 else NETWORK_BYTES_PER_SECOND
    return max(0.0, (GRADIENT_BYTES + work.element_bytes) * parameters * (dp - 1) / dp / rate - backward)


def host_seconds(settings: TrainSettings, parameters: int) -> float:
    """Seconds to copy the optimizer state from the host and back, both at once, during its update."""
    if settings.optimizer_state not in OFFLOADED:
        return 0.0
    shards = settings.sizes.dp * settings.sizes.cp
    return adam_bytes(parameters, settings.precision, settings.optimizer_state) / shards / HOST_BYTES_PER_SECOND


@dataclass(frozen=True)
class Speed:
    """Seconds per step and the figures derived from it."""

    step_seconds: float
    tokens_per_second: float  # over all GPUs
    bubble: float  # fraction of the step in which a stage is idle

    def days(self, tokens: float) -> float:
        """Days to train on `tokens`."""
        return tokens / self.tokens_per_second / 86400


def speed(settings: TrainSettings, work: Workload, gpu: Gpu) -> Speed:
    """The speed of a run; raises KitError as QwenConfig.chunk_layers does."""
    return stages_speed(settings, work, chunks_of_ranks(work.qwen, settings.sizes), gpu)


def stages_speed(settings: TrainSettings, work: Workload, stages: Sequence[Chunks], gpu: Gpu) -> Speed:
    """The speed of a run with these chunks in its stages, whatever PIPELINE_LAYERS of `settings`.

    That of the slowest stage's micro-batches, and the pipeline's bubble of (PP - 1) / VPP of them.
    """
    sizes, distinct = settings.sizes, {*stages}
    kinds = {*itertools.chain(*distinct)}
    costs = chunk_costs(work, kinds, gpu)
    trained = {chunk: trained_parameters(work, chunk) for chunk in kinds}
    passed = pipeline_seconds(settings, work)
    microbatch = once = 0.0
    for chunks in distinct:
        num_layers = sum(chunk.num_layers for chunk in chunks)
        parameters = sum(trained[chunk] for chunk in chunks)
        own = seconds(add(*(costs[chunk] for chunk in chunks)))
        own += tensor_parallel_seconds(work, num_layers)
        own += context_parallel_seconds(settings, work, num_layers)
        own += passed
        after = seconds(step_cost(work, num_layers, parameters, gpu, sizes.dp * sizes.cp))
        after += host_seconds(settings, parameters)
        after += data_parallel_seconds(settings, work, parameters, own * 2 / 3)
        microbatch, once = max(microbatch, own), max(once, after)
    number = sizes.num_microbatches(settings.global_batch_size, settings.micro_batch_size)
    bubble = (sizes.pp - 1) / sizes.vpp  # in micro-batches: arXiv 2104.04473, section 2.2
    step = (number + bubble) * microbatch + once
    tokens = settings.global_batch_size * settings.rows_per_sample * settings.seq_length
    return Speed(step, tokens / step, bubble * microbatch / step)
