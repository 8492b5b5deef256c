"""The GPU memory that each pipeline stage of a run needs, and the maximum."""

from dataclasses import dataclass

from common.estimate.activations import Work, backward_bytes, final_norm_bytes, kept_by_chunk, loss_bytes
from common.estimate.constants import WORKSPACE_BYTES
from common.estimate.schedule import moments
from common.estimate.weights import (
    ELEMENT_BYTES,
    Chunk,
    StateBytes,
    adam_bytes,
    chunk_parameters,
    chunks_of_rank,
    state_bytes,
    vocabulary_parameters,
)
from common.model.shape.config import QwenConfig
from common.platforms.base import Platform
from common.training.settings import TrainSettings

# As in common/training/state/optimizer.py, which imports torch; a test holds them together.
OPTIMIZER_PART = 1 << 28


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one GPU of a pipeline stage, at the moment when they are the most."""

    pp_rank: int
    parameters: int
    state: StateBytes
    activations: int  # what passes keep, and what the pass of that moment needs
    kept: int  # of the activations, what passes keep for backward ones
    step: int  # what the optimizer's step needs for a moment, when the activations are gone
    workspace: int

    @property
    def peak(self) -> int:
        """What torch.cuda.max_memory_allocated tells."""
        return self.state.total + max(self.activations, self.step) + self.workspace


def work_of(settings: TrainSettings, platform: Platform, qwen: QwenConfig) -> Work:
    """What the activations of a run depend on."""
    impl = settings.transformer_impl or platform.transformer_impl
    samples_in_rows = settings.packing or settings.reset_attention
    return Work(
        qwen=qwen,
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        tp=settings.tp,
        cp=settings.cp,
        sequence_parallel=settings.sequence_parallel,
        precision=settings.precision,
        transformer_impl=impl,
        recompute=settings.recompute,
        recompute_num_layers=settings.recompute_num_layers,
        masked=samples_in_rows and impl == "local",
        joined=samples_in_rows and impl == "transformer_engine",
        fused_kernels=platform.fused_kernels,
        fused_products=settings.fused_products == "true",
    )


def rank_memory(settings: TrainSettings, platform: Platform, qwen: QwenConfig, pp_rank: int) -> RankMemory:
    """The memory of pipeline stage `pp_rank`."""
    work, sizes = work_of(settings, platform, qwen), settings.sizes
    chunks = chunks_of_rank(qwen, sizes, pp_rank)
    parameters = sum(chunk_parameters(qwen, settings.tp, chunk) for chunk in chunks)
    num_microbatches = sizes.num_microbatches(settings.global_batch_size, settings.micro_batch_size)
    activations, kept = peak_activations(work, chunks, sizes.pp, pp_rank, num_microbatches)
    state = state_bytes(parameters, settings.precision, settings.optimizer_state, sizes.dp * sizes.cp)
    step = optimizer_bytes(settings, platform, qwen, parameters)
    return RankMemory(pp_rank, parameters, state, activations, kept, step, workspace_bytes(work))


def optimizer_bytes(settings: TrainSettings, platform: Platform, qwen: QwenConfig, parameters: int) -> int:
    """What the optimizer's step needs for a moment, when no pass is running."""
    shard = -(-parameters // (settings.sizes.dp * settings.sizes.cp))
    # A step at once is of a part of the parameters (PART in state/training_state.py) or of the largest one.
    part = min(shard, max(OPTIMIZER_PART, vocabulary_parameters(qwen, settings.tp)))
    if settings.optimizer_state == "bf16":
        return 10 * part  # both moments in float32, and one of them in bf16 again
    # torch's own Adam makes the denominator of its quotient for all parameters at once.
    own = 4 if platform.device == "cuda" and not platform.transformer_engine else 0
    if settings.optimizer_state == "cpu":
        return adam_bytes(part, settings.precision, "cpu") + own * part
    return own * shard


def peak_activations(work: Work, chunks: list[Chunk], pp: int, pp_rank: int, num_microbatches: int) -> tuple[int, int]:
    """(bytes of activations at their most, those kept for backward passes then) of a stage with these chunks."""
    # With VPP, outputs that were sent on are kept too (deallocate_pipeline_outputs=False in common/model/build.py).
    sent = [work.stream if len(chunks) > 1 and not chunk.last else 0 for chunk in chunks]
    kept = [kept_by_chunk(work, chunk) + output for chunk, output in zip(chunks, sent, strict=True)]
    whole = min(num_microbatches, 4 * pp)  # from then on the moments repeat
    # What comes from a neighbour while what was made goes to one; with VPP (overlap_p2p_comm) both twice.
    passed = 0 if pp == 1 else (2 if len(chunks) == 1 else 4) * work.stream
    most = (0, 0)
    for moment in moments(pp, len(chunks), pp_rank, whole):
        chunk = chunks[moment.chunk]
        held = sum(number * each for number, each in zip(moment.in_flight, kept, strict=True))
        most = max(most, (held + passed + pass_bytes(work, chunk, moment.forward), held))
    return most


def pass_bytes(work: Work, chunk: Chunk, forward: bool) -> int:
    """What a pass of `chunk` needs beside what is kept: the loss in forward passes, gradients in backward ones."""
    if forward:
        return loss_bytes(work) if chunk.last else work.stream
    vocabulary = work.element * vocabulary_parameters(work.qwen, work.tp)
    # The output layer's empty gradient stays until the embedding's is there, where both are one parameter.
    tied = vocabulary if chunk.first and chunk.last and work.qwen.tie_word_embeddings else 0
    # The final norm's backward pass is over before that of the last layer, which needs the most.
    return backward_bytes(work, chunk) + tied - (final_norm_bytes(work) if chunk.last else 0)


def workspace_bytes(work: Work) -> int:
    """Buffers of the libraries: a fixed size, and for Transformer Engine's layers an unused gradient of each shape.

    The latter stands in for the gradients that its products add to the float32 buffers by themselves.
    """
    qwen = work.qwen
    if not work.engine:
        return WORKSPACE_BYTES["local"]
    rows = qwen.qkv_rows + qwen.num_attention_heads * qwen.head_dim
    rows += 0 if work.fused_products else 3 * qwen.intermediate_size
    return WORKSPACE_BYTES["transformer_engine"] + ELEMENT_BYTES[work.precision] * rows * qwen.hidden_size // work.tp
