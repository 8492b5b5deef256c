"""The GPU memory that each pipeline stage of a run needs, and the maximum."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.estimate.activations import Workload, backward_bytes, final_norm_bytes, kept_by_chunk, loss_bytes
from common.estimate.constants import CONTEXT_BYTES, NCCL_BYTES, WORKSPACE_BYTES
from common.estimate.schedule import fullest_moments
from common.estimate.weights import (
    ELEMENT_BYTES,
    Chunk,
    StateBytes,
    adam_bytes,
    chunk_parameters,
    chunks_of_ranks,
    state_bytes,
    vocabulary_parameters,
)
from common.model.shape.config import QwenConfig
from common.model.shape.lora import adapter_parameters
from common.platforms.base import Platform
from common.training.settings import TrainSettings
from common.training.settings.optimizer import OFFLOADED

# PART in common/training/state/optimizer.py and that of optimizer_offload.py, which import torch; a test compares them.
OPTIMIZER_PART = 1 << 28
OFFLOADED_PART = 1 << 26
CPU_BF16_STEP_BYTES = 6 + 6 + 12 + 6 + 14
EXCHANGE_SLOTS = 4  # of the hidden states of all tokens: len(KINDS) * SLOTS in common/model/kernels/peer_copies.py


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one GPU of a pipeline stage, at the peak."""

    pp_rank: int
    parameters: int
    state: StateBytes
    activations: int  # those saved for backward passes, and the temporaries of the pass at the peak
    kept: int  # of the activations, those saved for backward passes
    step: int  # temporaries of the optimizer's step, when the activations are freed
    workspace: int

    @property
    def peak(self) -> int:
        """What torch.cuda.max_memory_allocated reports."""
        return self.state.total + max(self.activations, self.step) + self.workspace


def work_of(settings: TrainSettings, platform: Platform, qwen: QwenConfig) -> Workload:
    """What the activations of a run depend on."""
    impl = settings.transformer_impl or platform.transformer_impl
    return Workload(
        qwen=qwen,
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size * settings.rows_per_sample,
        tp=settings.tp,
        cp=settings.cp,
        sequence_parallel=settings.sequence_parallel,
        precision=settings.precision,
        transformer_impl=impl,
        recompute=settings.recompute,
        recompute_num_layers=settings.recompute_num_layers,
        separate=bool(settings.packing or settings.reset_attention),
        fused_kernels=platform.fused_kernels,
        fused_products=settings.fused_products == "true",
        lora=settings.lora,
        recomputed_loss=settings.train_mode == "dpo",
        core_attention=settings.core_attention,
        fp8_recipe=settings.fp8_recipe if settings.fp8_format != "none" else "",
        tp_copies=platform.fused_kernels and settings.tp_comm_overlap == "auto" and settings.tp <= settings.gpus,
    )


def rank_memories(
    settings: TrainSettings, platform: Platform, qwen: QwenConfig, work: Workload | None = None
) -> tuple[RankMemory, ...]:
    """The memory of each pipeline stage.

    work: what `work_of` gives, from a caller that has it. Raises KitError as QwenConfig.chunk_layers does.
    """
    work, sizes = work or work_of(settings, platform, qwen), settings.sizes
    stages = chunks_of_ranks(qwen, sizes)
    number = sizes.num_microbatches(settings.global_batch_size, settings.micro_batch_size)
    # Most stages have the same chunks, and differ in how many micro-batches are in flight.
    needs = {chunk: chunk_needs(work, chunk, alone=sizes.vpp == 1) for chunk in {*itertools.chain(*stages)}}
    fixed = {chunks: _fixed_memory(settings, platform, work, [needs[each] for each in chunks]) for chunks in {*stages}}
    ranks = []
    for pp_rank, chunks in enumerate(stages):
        parameters, state, step, workspace = fixed[chunks]
        peak, kept = peak_activations(work, [needs[chunk] for chunk in chunks], sizes.pp, pp_rank, number)
        ranks.append(RankMemory(pp_rank, parameters, state, peak, kept, step, workspace))
    return tuple(ranks)


class ChunkNeeds(NamedTuple):
    """What a chunk has on a GPU."""

    parameters: int
    trained: int  # parameters that have gradients
    fp8_copies: int  # bytes of FP8 copies of its weights
    kept: int  # bytes of activations for each micro-batch in flight
    forward: int  # bytes of temporaries of a forward pass
    backward: int  # and of a backward pass


def chunk_needs(work: Workload, chunk: Chunk, *, alone: bool) -> ChunkNeeds:
    """What a chunk has on a GPU. alone: whether its stage has no other chunk."""
    # With VPP, outputs are kept after they are sent (deallocate_pipeline_outputs=False in common/model/build.py).
    sent = 0 if alone or chunk.last else work.residual_bytes
    trained = trained_parameters(work, chunk)
    return ChunkNeeds(
        parameters=trained + (chunk_parameters(work.qwen, work.tp, chunk) if work.lora else 0),
        trained=trained,
        fp8_copies=fp8_weight_bytes(work, chunk),
        kept=kept_by_chunk(work, chunk) + sent,
        forward=pass_bytes(work, chunk, forward=True),
        backward=pass_bytes(work, chunk, forward=False),
    )


def _fixed_memory(
    settings: TrainSettings, platform: Platform, work: Workload, needs: Sequence[ChunkNeeds]
) -> tuple[int, StateBytes, int, int]:
    """(parameters, state, temporary bytes of the optimizer's step, workspace) of a stage with these chunks."""
    parameters, trained = sum(each.parameters for each in needs), sum(each.trained for each in needs)
    shards = settings.sizes.dp * settings.sizes.cp
    state = state_bytes(parameters, settings.precision, settings.optimizer_state, shards, trained)
    step = optimizer_bytes(settings, platform, work.qwen, trained)
    return parameters, state, step, workspace_bytes(work) + sum(each.fp8_copies for each in needs)


def bytes_beside_torch(settings: TrainSettings, work: Workload) -> int:
    """Bytes on a GPU that torch's allocator does not count: CUDA's, NCCL's and the slots of exchanging ranks."""
    slots = EXCHANGE_SLOTS * work.hidden_bytes if work.exchanging else 0
    return CONTEXT_BYTES + (NCCL_BYTES if settings.sizes.world_size > 1 else 0) + slots


def trained_parameters(work: Workload, chunk: Chunk) -> int:
    """The parameters of a chunk that have gradients: those of its adapters, or without adapters all."""
    if work.lora is None:
        return chunk_parameters(work.qwen, work.tp, chunk)
    return adapter_parameters(work.lora, work.qwen, work.tp) * chunk.num_layers


def optimizer_bytes(settings: TrainSettings, platform: Platform, qwen: QwenConfig, parameters: int) -> int:
    """Peak temporary bytes of the optimizer's step."""
    shard = -(-parameters // (settings.sizes.dp * settings.sizes.cp))
    # The step runs on PART parameters at a time (state/optimizer.py), or on one larger tensor.
    part = min(shard, max(OPTIMIZER_PART, vocabulary_parameters(qwen, settings.tp)))
    if settings.optimizer_state == "bf16":
        return 10 * part  # both moments in float32, and a bf16 copy of one
    # torch's own Adam computes the denominator of the update for all parameters at once.
    own = 4 if platform.device == "cuda" and platform.transformer_impl == "local" else 0
    if settings.optimizer_state not in OFFLOADED:
        return own * shard
    part = min(shard, OFFLOADED_PART)
    if settings.optimizer_state == "cpu":  # one part comes, one is updated, one goes
        return adam_bytes(min(shard, 3 * part), settings.precision, "cpu") + own * part
    # The next part and the last one; this one in float32 and as it goes; of a tensor's new bits four copies.
    return CPU_BF16_STEP_BYTES * part


def peak_activations(
    work: Workload, needs: Sequence[ChunkNeeds], pp: int, pp_rank: int, num_microbatches: int
) -> tuple[int, int]:
    """(peak bytes of activations, those of them saved for backward passes) of a stage with these chunks."""
    num_distinct = min(num_microbatches, 4 * pp)  # then the schedule repeats
    # One buffer to send and one to receive; with VPP (overlap_p2p_comm) two of each.
    passed = 0 if pp == 1 else (2 if len(needs) == 1 else 4) * work.residual_bytes
    kept = [each.kept for each in needs]
    most = (0, 0)
    for forward, chunk, in_flight in fullest_moments(pp, len(needs), pp_rank, num_distinct):
        held = sum(map(operator.mul, in_flight, kept))
        temporary = needs[chunk].forward if forward else needs[chunk].backward
        most = max(most, (held + passed + temporary, held))
    return most


def pass_bytes(work: Workload, chunk: Chunk, *, forward: bool) -> int:
    """Temporary bytes of a pass of `chunk`: the loss in a forward pass, gradients in a backward pass."""
    if forward:
        return loss_bytes(work) if chunk.last else work.residual_bytes
    vocabulary = work.element_bytes * vocabulary_parameters(work.qwen, work.tp)
    # With tied embeddings the output layer's unused gradient stays until the embedding's exists.
    tied = vocabulary if chunk.first and chunk.last and work.qwen.tie_word_embeddings else 0
    # The final norm's backward pass is over before that of the last layer, which needs the most.
    return backward_bytes(work, chunk) + tied - (final_norm_bytes(work) if chunk.last else 0)


def workspace_bytes(work: Workload) -> int:
    """Bytes of the libraries' buffers: a fixed size, and with Transformer Engine a dummy gradient of each weight shape.

    Autograd gets the dummy, since the fused weight gradient is added to the float32 `main_grad` directly.
    """
    qwen = work.qwen
    if not work.transformer_engine:
        return WORKSPACE_BYTES["local"]
    rows = qwen.qkv_rows + qwen.num_attention_heads * qwen.head_dim
    rows += 0 if work.fused_products else 3 * qwen.intermediate_size
    return WORKSPACE_BYTES["transformer_engine"] + ELEMENT_BYTES[work.precision] * rows * qwen.hidden_size // work.tp


def fp8_weight_bytes(work: Workload, chunk: Chunk) -> int:
    """Bytes of the FP8 copies of a chunk's weights, as they are and transposed, made once per step.

    Transformer Engine keeps them from a step's first micro-batch on (`is_first_microbatch`); the output layer has none.
    """
    if not work.fp8_recipe:
        return 0
    qwen = work.qwen
    rows = qwen.qkv_rows + qwen.num_attention_heads * qwen.head_dim + 3 * qwen.intermediate_size
    return 2 * chunk.num_layers * rows * qwen.hidden_size // work.tp
