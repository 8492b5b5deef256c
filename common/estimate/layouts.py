"""Every layout of a model on a number of GPUs: memory, whether it fits, speed; or why it is refused."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import KitError
from common.estimate.constants import CONTEXT_BYTES, NCCL_BYTES, RESERVED_SHARE
from common.estimate.goodput import LLAMA_3_GPU_MTBF_HOURS
from common.estimate.gpus import Gpu
from common.estimate.memory import RankMemory, rank_memory
from common.estimate.speed import Speed, speed
from common.model.shape.config import QwenConfig
from common.settings import option
from common.training.planning.compatibility import check_fit
from common.training.settings import TrainSettings

RECOMPUTE = ("none", "selective", "full")
TENSOR_PARALLEL = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class EstimateSettings:
    """What is asked; the settings of training under their names, where nothing is given each value that may be."""

    hf_model_path: str = option(help="folder with the model's config.json; nothing else in it is read")
    gpu: str = option(help="type of the GPUs, as H100, H200, A100, C500")
    gpus: int = option(1, "GPUs of a node")
    nnodes: int = option(1, "nodes")
    seq_length: int = option(2048, "tokens in a sample")
    global_batch_size: int = option(16, "samples in one step over all GPUs")
    micro_batch_size: int | None = option(None, "samples a GPU runs at once; default: 1 to 32")
    tp: int | None = option(None, "tensor parallel size; default: each within a node")
    pp: int | None = option(None, "pipeline parallel size; default: each that the GPUs and layers have")
    vpp: int = option(1, "virtual pipeline chunks a rank")
    pipeline_layers: str | None = option(None, "layers of each stage (with VPP of each chunk), as 7,7,8,6")
    cp: int = option(1, "context parallel size")
    recompute: str | None = option(None, "activations computed again; default: each kind", RECOMPUTE)
    recompute_num_layers: int | None = option(None, "with full: only so many layers of each chunk; default: all")
    precision: str = option("bf16", "bf16 has float32 master weights and gradients", ("bf16", "fp32"))
    optimizer_state: str = option(
        "fp32",
        "bf16: Adam's moments in bf16; cpu: with master weights on the host",
        ("fp32", "bf16", "cpu"),
    )
    transformer_impl: str | None = option(None, "layers; default: the platform's", ("transformer_engine", "local"))
    sequence_parallel: bool = option(True, "with TP above 1: split activations over the sequence too")
    fused_products: str = option(
        "auto",
        "true: as where requirements/hopper.txt is installed; auto: as where it is not",
        ("auto", "true", "false"),
    )
    packing: bool = option(False, "finetune: several samples a row, kept apart")
    tokens: float | None = option(None, "tokens to train on, as 1e9, for the days it takes")
    memory_gib: float | None = option(None, "of a GPU, where it is not what its type has")
    save_interval: int = option(TrainSettings.save_interval, "steps between checkpoints, to hold against the best")
    keep_checkpoints: int = option(TrainSettings.keep_checkpoints, "newest checkpoints to keep; 0: all")
    disk_gb_s: float = option(2.0, "GB/s at which all nodes together write a checkpoint, and read it")
    save_stall_s: float | None = option(
        None, "seconds that training stands still for a save, as with ASYNC_SAVE; default: until it is written"
    )
    gpu_mtbf_hours: float = option(
        float(round(LLAMA_3_GPU_MTBF_HOURS)),
        "mean hours between faults of one GPU and its share of all else; default: Llama 3's",
    )
    detection_s: float = option(
        60.0 * TrainSettings.distributed_timeout_min, "seconds until a fault is seen; default: DISTRIBUTED_TIMEOUT_MIN"
    )
    restart_s: float = option(120.0, "seconds from there until processes, model and connections are there again")
    rows: int = option(12, "layouts to show; 0: all")

    def __post_init__(self) -> None:
        for name in ("gpus", "nnodes", "tp", "pp", "cp", "save_interval"):
            self._need(name, getattr(self, name) is None or getattr(self, name) >= 1, "it must be at least 1")
        for name in ("tokens", "memory_gib", "disk_gb_s", "gpu_mtbf_hours"):
            self._need(name, getattr(self, name) is None or getattr(self, name) > 0, "it must be above 0")
        for name in ("rows", "keep_checkpoints", "save_stall_s", "detection_s", "restart_s"):
            self._need(name, (getattr(self, name) or 0) >= 0, "it must not be negative")

    def _need(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise KitError(f"{name.upper()}={getattr(self, name)}: {rule}")


@dataclass(frozen=True)
class Estimate:
    """One layout. `fits` is "yes", "tight" (if nothing is lost between the allocator's blocks) or "no"."""

    settings: TrainSettings
    ranks: tuple[RankMemory, ...]  # of each pipeline stage
    fits: str
    speed: Speed | None  # None: rates that it depends on are not known

    @property
    def largest(self) -> RankMemory:
        """The stage that needs the most."""
        return max(self.ranks, key=lambda rank: rank.peak)


@dataclass(frozen=True)
class Refusal:
    """A layout that training would refuse, and its reason."""

    layout: dict[str, int | str]
    reason: str


def choices(asked: EstimateSettings, num_layers: int) -> Iterator[dict[str, int | str]]:
    """The values that may be, of those settings that are not given."""
    tensor = [n for n in TENSOR_PARALLEL if n <= asked.gpus] if asked.tp is None else [asked.tp]
    microbatches = MICRO_BATCHES if asked.micro_batch_size is None else (asked.micro_batch_size,)
    kinds = RECOMPUTE if asked.recompute is None else (asked.recompute,)
    for tp in tensor:
        left = max(1, asked.gpus * asked.nnodes // (tp * asked.cp))
        stages = [n for n in range(1, min(left, num_layers) + 1) if left % n == 0] if asked.pp is None else [asked.pp]
        for pp, size, kind in itertools.product(stages, microbatches, kinds):
            yield {"tp": tp, "pp": pp, "micro_batch_size": size, "recompute": kind}


def train_settings(asked: EstimateSettings, chosen: dict[str, int | str]) -> TrainSettings:
    """The settings of a run with the chosen values; raises KitError as training does."""
    same = ("gpus", "nnodes", "seq_length", "global_batch_size", "vpp", "pipeline_layers", "cp", "precision",
            "fused_products")  # fmt: skip
    names = (*same, "transformer_impl", "sequence_parallel", "packing", "optimizer_state", "recompute_num_layers")
    return TrainSettings(
        save_checkpoint_path="-",
        dataset_path="-",
        train_iters=1,
        train_mode="finetune" if asked.packing else "pretrain",
        **{name: getattr(asked, name) for name in names},
        **chosen,  # type: ignore[arg-type]
    )


def estimate(settings: TrainSettings, qwen: QwenConfig, gpu: Gpu) -> Estimate:
    """What these settings need; raises KitError where training would refuse them."""
    check_fit(settings, gpu.platform, qwen)
    ranks = tuple(rank_memory(settings, gpu.platform, qwen, pp_rank) for pp_rank in range(settings.pp))
    peak = max(rank.peak for rank in ranks)
    usable = gpu.memory_gib * 2**30 - CONTEXT_BYTES - (NCCL_BYTES if settings.sizes.world_size > 1 else 0)
    fits = "yes" if peak * RESERVED_SHARE <= usable else "tight" if peak <= usable else "no"
    return Estimate(settings, ranks, fits, speed(settings, gpu.platform, qwen, gpu) if gpu.rated else None)


def estimate_all(asked: EstimateSettings, qwen: QwenConfig, gpu: Gpu) -> tuple[list[Estimate], list[Refusal]]:
    """Each layout's estimate, those that fit and are fastest first, and each refusal.

    Raises KitError where every layout is refused, with the reason of the first.
    """
    found, refused = [], []
    for chosen in choices(asked, qwen.num_hidden_layers):
        try:
            found.append(estimate(train_settings(asked, chosen), qwen, gpu))
        except KitError as error:
            refused.append(Refusal(chosen, str(error)))
    if not found:
        raise KitError(refused[0].reason)
    return sorted(found, key=_rank), refused


def _rank(one: Estimate) -> tuple[int, float]:
    """The best first: by whether it fits, then by speed where that is known and it fits, else by memory."""
    order = ("yes", "tight", "no").index(one.fits)
    return order, -one.speed.tokens_per_second if one.speed and one.fits != "no" else one.largest.peak
