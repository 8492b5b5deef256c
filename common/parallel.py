"""Parallel sizes of a run: tensor, pipeline, context and data parallelism."""

import os
from dataclasses import dataclass

from common.errors import KitError


def is_node_leader() -> bool:
    """Whether this process reports for its node: local rank 0, or not a rank at all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def parse_pipeline_layers(text: str | None) -> tuple[int, ...]:
    """(7, 7, 8, 6) for "7,7,8,6", () for an empty text or None; raises KitError unless each is a positive integer."""
    words = text.split(",") if text else []
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise KitError(f"PIPELINE_LAYERS={text}: give the layers of each pipeline stage with commas, as 7,7,8,6")
    return tuple(int(word) for word in words)


@dataclass(frozen=True)
class ParallelSizes:
    """The sizes of a run; `world_size` = tp x pp x cp x dp ranks.

    Raises KitError if `world_size` is not a multiple of tp x pp x cp, or if VPP is set without pipeline stages.
    QwenConfig.chunk_layers checks that `pipeline_layers` fit the model.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    pipeline_layers: tuple[int, ...] = ()  # per chunk, in the model's order; empty: the same number in each

    def __post_init__(self) -> None:
        for name in ("world_size", "tp", "pp", "vpp", "cp"):
            if getattr(self, name) < 1:
                raise KitError(f"{name.upper()}={getattr(self, name)}: it must be at least 1")
        if self.world_size % (self.tp * self.pp * self.cp):
            raise KitError(
                f"{self.world_size} GPUs (GPUS x NNODES) cannot be divided by TP={self.tp} x PP={self.pp}"
                f" x CP={self.cp} = {self.tp * self.pp * self.cp}: change GPUS, NNODES, TP, PP or CP"
            )
        if self.vpp > 1 and self.pp == 1:
            raise KitError(f"VPP={self.vpp} needs pipeline stages, but PP=1: set PP to 2 or more, or VPP=1")

    @property
    def dp(self) -> int:
        """The data-parallel size: the number of replicas of the model."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def replicas(self) -> int:
        """The number of ranks with the same weights, dp x cp, over which the optimizer is sharded."""
        return self.dp * self.cp

    def dp_rank(self, rank: int) -> int:
        """The data-parallel rank of global rank `rank`, in Megatron-Core's order (tp-cp-ep-dp-pp)."""
        return rank // (self.tp * self.cp) % self.dp

    def pp_rank(self, rank: int) -> int:
        """The pipeline stage of global rank `rank`."""
        return rank // (self.tp * self.cp * self.dp)

    def tp_group(self, rank: int) -> range:
        """The global ranks of the tensor-parallel group of global rank `rank`."""
        first = rank - rank % self.tp
        return range(first, first + self.tp)

    def num_microbatches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """The number of micro-batches per replica and step; raises KitError if the batch sizes do not divide."""
        if global_batch_size % (micro_batch_size * self.dp):
            raise KitError(
                f"GLOBAL_BATCH_SIZE={global_batch_size} cannot be divided by MICRO_BATCH_SIZE={micro_batch_size}"
                f" x {self.dp} data-parallel replicas: make it a multiple of {micro_batch_size * self.dp}"
            )
        return global_batch_size // (micro_batch_size * self.dp)
