"""Parallel sizes, and which communication overlaps with computation."""

from dataclasses import dataclass
from functools import cached_property

from common.errors import KitError
from common.parallel import ParallelSizes, parse_pipeline_layers
from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Parallelism."""

    gpus: int = option(1, "processes on this node, one per GPU")
    nnodes: int = option(1, "number of nodes")
    tp: int = option(1, "tensor parallel size; above 1, sequence parallel too")
    pp: int = option(1, "pipeline parallel size")
    vpp: int = option(1, "virtual pipeline chunks per rank")
    pipeline_layers: str | None = option(None, "layers of each stage (of each chunk with VPP), such as 7,7,8,6")
    cp: int = option(1, "context parallel size: GPUs that share a row")
    sequence_parallel: bool = option(True, "with TP above 1: also split activations along the sequence")
    overlap_grad_reduce: bool = option(True, "with DP x CP above 1: reduce gradients during the backward pass")
    overlap_param_gather: bool = option(True, "with DP x CP above 1: gather weights during the forward pass")
    tp_comm_overlap: str = option(
        "auto", "TP above 1: communicate beside matrix products; auto: by copies of GPUs, true: Transformer Engine's",
        choices=("auto", "true", "false"),
    )  # fmt: skip

    def check_parallel(self) -> None:
        """Raises KitError for values out of range or in conflict."""
        for name in ("gpus", "nnodes"):
            require(self, name, getattr(self, name) >= 1, "it must be at least 1")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise KitError(
                "OVERLAP_PARAM_GATHER=true with OVERLAP_GRAD_REDUCE=false: Megatron-Core gathers weights in the buckets"
                " of the gradient reduction: set OVERLAP_PARAM_GATHER=false too"
            )

    @cached_property
    def sizes(self) -> ParallelSizes:
        """The parallel sizes of the whole run, over all nodes."""
        layers = parse_pipeline_layers(self.pipeline_layers)
        return ParallelSizes(self.gpus * self.nnodes, self.tp, self.pp, self.vpp, self.cp, layers)

    @property
    def overlaps(self) -> tuple[bool, bool]:
        """Whether to overlap gradient reduction and parameter gather: both false with a single replica."""
        replicated = self.sizes.replicas > 1
        return replicated and self.overlap_grad_reduce, replicated and self.overlap_param_gather
