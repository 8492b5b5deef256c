"""How the GPUs of a run are divided: tensor, pipeline, context and data parallel sizes."""

from dataclasses import dataclass

from common.errors import KitError


@dataclass(frozen=True)
class ParallelSizes:
    """The sizes of a run; `world_size` = tp x pp x cp x dp ranks.

    Raises KitError when `world_size` is no multiple of tp x pp x cp, or VPP is asked for without pipeline stages.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1

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
        """Data-parallel replicas."""
        return self.world_size // (self.tp * self.pp * self.cp)

    def num_microbatches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Micro-batches a replica runs in one step; raises KitError when the sizes do not divide."""
        if global_batch_size % (micro_batch_size * self.dp):
            raise KitError(
                f"GLOBAL_BATCH_SIZE={global_batch_size} cannot be divided by MICRO_BATCH_SIZE={micro_batch_size}"
                f" x {self.dp} data-parallel replicas: make it a multiple of {micro_batch_size * self.dp}"
            )
        return global_batch_size // (micro_batch_size * self.dp)
