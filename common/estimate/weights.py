"""The parameters on a rank, and the bytes of weights, gradients and optimizer state.

Letters: h hidden_size, f intermediate_size, v rows of the padded vocabulary.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from common.model.shape.config import QwenConfig
from common.model.shape.parameters import ELEMENT_BYTES, layer_parameters, vocabulary_parameters
from common.parallel import ParallelSizes
from common.training.settings.optimizer import BF16_MOMENTS, OFFLOADED

GRADIENT_BYTES = 4  # float32 buffers (grad_reduce_in_fp32)
MOMENT_BYTES = {"fp32": 8, "bf16": 4, "cpu": 8, "cpu_bf16": 4}  # Adam's two, by OPTIMIZER_STATE
MASTER_BYTES = {"bf16": 4, "fp32": 0}  # the float32 copy of the parameters; in fp32 there is none
REMAINDER_BYTES = 2  # of a master weight beside its bf16 weight, with bf16 moments


class Chunk(NamedTuple):
    """One virtual pipeline chunk: its layers, and whether it is the model's first or last."""

    num_layers: int
    first: bool
    last: bool


Chunks = tuple[Chunk, ...]  # the VPP chunks of a pipeline rank, in the model's order


def chunks_of_ranks(qwen: QwenConfig, sizes: ParallelSizes) -> tuple[Chunks, ...]:
    """The chunks of each pipeline rank; raises KitError as QwenConfig.chunk_layers does."""
    return split_chunks(qwen.chunk_layers(sizes.pp, sizes.vpp, sizes.pipeline_layers), sizes.pp)


@cache
def split_chunks(layers: tuple[int, ...], pp: int) -> tuple[Chunks, ...]:
    """The chunks of each pipeline rank, from the layers of each chunk in the model's order."""
    chunks = [Chunk(number, place == 0, place == len(layers) - 1) for place, number in enumerate(layers)]
    return tuple(tuple(chunks[pp_rank::pp]) for pp_rank in range(pp))


def chunk_parameters(qwen: QwenConfig, tp: int, chunk: Chunk) -> int:
    """Parameters of a chunk on one tensor-parallel rank.

    Tied embeddings are one matrix; if embedding and output layer are on two pipeline stages, each has a copy.
    """
    total = chunk.num_layers * layer_parameters(qwen, tp)
    matrices = int(chunk.first) + int(chunk.last)
    if chunk.first and chunk.last and qwen.tie_word_embeddings:
        matrices = 1
    return total + matrices * vocabulary_parameters(qwen, tp) + (qwen.hidden_size if chunk.last else 0)


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds throughout the run."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    parameters: int, precision: str, optimizer_state: str, shards: int, trained: int | None = None
) -> StateBytes:
    """The bytes of `parameters` on the GPU; the optimizer's may be on the host (OPTIMIZER_STATE=cpu, cpu_bf16).

    trained: those of them that have gradients; None: all.
    The optimizer's are divided over `shards` = DP x CP ranks (P_os of arXiv 1910.02054).
    Megatron-Core pads its buffers: a parameter to 64 elements, a bucket to 128 x DP; that is not counted.
    """
    trained = parameters if trained is None else trained
    optimizer = 0 if optimizer_state in OFFLOADED else adam_bytes(trained, precision, optimizer_state)
    return StateBytes(ELEMENT_BYTES[precision] * parameters, GRADIENT_BYTES * trained, -(-optimizer // shards))


def adam_bytes(parameters: int, precision: str, optimizer_state: str) -> int:
    """The bytes of master weights and moments, on the GPU or on the host."""
    master = REMAINDER_BYTES if optimizer_state in BF16_MOMENTS else MASTER_BYTES[precision]
    return (master + MOMENT_BYTES[optimizer_state]) * parameters
