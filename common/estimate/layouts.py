"""Every layout of a model on a number of GPUs: memory, whether it fits, speed; or why it is refused."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from common.errors import KitError
from common.estimate.activations import Workload
from common.estimate.balance import faster_split
from common.estimate.constants import RESERVED_SHARE
from common.estimate.goodput import LLAMA_3_GPU_MTBF_HOURS
from common.estimate.gpus import WITHOUT_FP8, Gpu, with_rates
from common.estimate.memory import RankMemory, bytes_beside_torch, rank_memories, work_of
from common.estimate.speed import Speed, speed
from common.model.shape.config import QwenConfig
from common.model.shape.lora import LoraConfig
from common.settings import option
from common.training.planning.compatibility import check_fit
from common.training.settings import TrainSettings
from common.training.settings.lora import LoraSettings
from common.training.settings.optimizer import OFFLOADED

RECOMPUTE = ("none", "selective", "full")
TENSOR_PARALLEL = (1, 2, 4, 8)
CONTEXT_PARALLEL = (1, 2, 4, 8, 16)
# Tokens of a row from which CP is searched. By the estimate, for 1.5B to 72B on 8 and 32 H100 and H200 with a million
# tokens a step, no CP is faster than 1 at 8192; at 16384 it gains up to 9% from 14B on, at 32768 in most cases.
LONG_ROW = 16384
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
VIRTUAL_CHUNKS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class EstimateSettings:
    """What to estimate: training settings under their own names. One that is not given takes every possible value."""

    hf_model_path: str = option(help="folder with the model's config.json; nothing else in it is read", hub="config")
    gpu: str = option(help="type of the GPUs, as H100, H200, A100, C500")
    gpus: int = option(1, "GPUs of a node")
    nnodes: int = option(1, "nodes")
    seq_length: int = option(2048, "tokens in a sample")
    global_batch_size: int = option(16, "samples in one step over all GPUs")
    micro_batch_size: int | None = option(None, "samples a GPU runs at once; default: 1 to 32")
    tp: int | None = option(None, "tensor parallel size; default: every size within a node")
    pp: int | None = option(None, "pipeline parallel size; default: every size that divides the GPUs")
    vpp: int | None = option(None, "virtual pipeline chunks per rank; default: 1 to 5, with PP above 1")
    pipeline_layers: str | None = option(
        None,
        "layers of each stage (with VPP of each chunk), such as 7,7,8,6; default: those of the shortest step, or with"
        " --pp the same number each",
    )
    cp: int | None = option(
        None,
        "context parallel size: GPUs that share a row; default: 1, and for rows of"
        f" {LONG_ROW} tokens or more every power of two up to {CONTEXT_PARALLEL[-1]} that divides the GPUs",
    )
    recompute: str | None = option(None, "activation recomputation; default: every kind", RECOMPUTE)
    recompute_num_layers: int | None = option(None, "with full: number of layers per chunk; default: all")
    fp8_format: str = option("none", "FP8 matrix products (Transformer Engine)", ("none", "hybrid", "e4m3"))
    fp8_recipe: str = option("tensorwise", "FP8 scaling", ("tensorwise", "delayed", "blockwise"))
    precision: str = option("bf16", "bf16 has float32 master weights and gradients", ("bf16", "fp32"))
    optimizer_state: str = option(
        "fp32",
        "bf16: Adam's moments in bf16; cpu: moments and master weights on the host; cpu_bf16: both",
        ("fp32", "bf16", *OFFLOADED),
    )
    transformer_impl: str | None = option(None, "layers; default: the platform's", ("transformer_engine", "local"))
    sequence_parallel: bool = option(True, "with TP above 1: split activations over the sequence too")
    fused_products: str = option(
        "auto",
        "true: with requirements/hopper.txt installed; auto: without",
        ("auto", "true", "false"),
    )
    train_mode: str | None = option(
        None,
        "pretrain, finetune or dpo; default: finetune with packing, else pretrain",
        ("pretrain", "finetune", "dpo"),
    )
    packing: bool = option(False, "finetune, dpo: several samples per row, with separate attention")
    tuner: str = option("full", "full: train all weights; lora: adapters alone", ("full", "lora"))
    lora_rank: int | None = option(None, "rank of the adapters; default: 16")
    lora_targets: str | None = option(None, "modules, as q_proj,v_proj; default: all-linear")
    tokens: float | None = option(None, "tokens to train on, such as 1e9, to estimate the days")
    memory_gib: float | None = option(None, "memory of a GPU; default: that of its type")
    save_interval: int = option(TrainSettings.save_interval, "steps between checkpoints, compared with the best")
    keep_checkpoints: int = option(TrainSettings.keep_checkpoints, "newest checkpoints to keep; 0: all")
    disk_gb_s: float = option(2.0, "GB/s at which all nodes together write and read a checkpoint")
    save_stall_s: float | None = option(
        None, "seconds that a save pauses training, as with ASYNC_SAVE; default: until it is written"
    )
    gpu_mtbf_hours: float = option(
        float(round(LLAMA_3_GPU_MTBF_HOURS)),
        "mean hours between faults per GPU, everything around it included; default: Llama 3's",
    )
    detection_s: float = option(
        60.0 * TrainSettings.distributed_timeout_min,
        "seconds until a fault is detected; default: DISTRIBUTED_TIMEOUT_MIN",
    )
    restart_s: float = option(120.0, "seconds from there until processes, model and connections are set up again")
    rows: int = option(12, "layouts to show; 0: all")

    def __post_init__(self) -> None:
        for name in ("gpus", "nnodes", "tp", "pp", "vpp", "cp", "save_interval"):
            self._need(name, getattr(self, name) is None or getattr(self, name) >= 1, "it must be at least 1")
        for name in ("tokens", "memory_gib", "disk_gb_s", "gpu_mtbf_hours"):
            self._need(name, getattr(self, name) is None or getattr(self, name) > 0, "it must be above 0")
        for name in ("rows", "keep_checkpoints", "save_stall_s", "detection_s", "restart_s"):
            self._need(name, (getattr(self, name) or 0) >= 0, "it must not be negative")

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None with TUNER=full."""
        given = {name: getattr(self, name) for name in ("tuner", "lora_rank", "lora_targets")}
        return LoraSettings(**given).lora

    def _need(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise KitError(f"{name.upper()}={getattr(self, name)}: {rule}")


@dataclass(frozen=True)
class Estimate:
    """One layout. `fits` is "yes", "tight" (only without fragmentation of the allocator's memory) or "no"."""

    settings: TrainSettings
    work: Workload
    ranks: tuple[RankMemory, ...]  # of each pipeline stage
    fits: str
    speed: Speed | None  # None: the GPU's rates are unknown
    rank_seconds: float  # of a step, at the rates of ASSUMED where the GPU's own are unknown: only to rank layouts

    @property
    def largest(self) -> RankMemory:
        """The stage that needs the most."""
        return max(self.ranks, key=lambda rank: rank.peak)


@dataclass(frozen=True)
class Refusal:
    """A layout that training would refuse, and the reason."""

    layout: dict[str, int | str]
    reason: str


def possible_layouts(settings: EstimateSettings, num_layers: int) -> Iterator[dict[str, int | str]]:
    """TP, PP, VPP, CP, micro-batch size and recomputation of every layout to estimate; given settings are fixed."""
    world_size = settings.gpus * settings.nnodes
    tensor = [n for n in TENSOR_PARALLEL if n <= settings.gpus] if settings.tp is None else [settings.tp]
    microbatches = MICRO_BATCHES if settings.micro_batch_size is None else (settings.micro_batch_size,)
    kinds = RECOMPUTE if settings.recompute is None else (settings.recompute,)
    for cp, tp in itertools.product(possible_context(settings), tensor):
        if cp > 1 and settings.cp is None and world_size % (tp * cp):
            continue
        pp_times_dp = max(1, world_size // (tp * cp))
        stages = [n for n in range(1, min(pp_times_dp, num_layers) + 1) if pp_times_dp % n == 0]
        for pp, size, kind in itertools.product(stages if settings.pp is None else [settings.pp], microbatches, kinds):
            for vpp in possible_chunks(settings, num_layers, pp):
                yield {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "micro_batch_size": size, "recompute": kind}


def possible_context(settings: EstimateSettings) -> tuple[int, ...]:
    """The CP to estimate: every size with long rows, unless one is given."""
    if settings.cp is not None:
        return (settings.cp,)
    return CONTEXT_PARALLEL if settings.seq_length >= LONG_ROW else (1,)


def possible_chunks(settings: EstimateSettings, num_layers: int, pp: int) -> list[int]:
    """The VPP to estimate at that PP: those that divide the layers of a stage, unless one is given."""
    if settings.vpp is not None:
        return [settings.vpp]
    if pp == 1 or settings.pipeline_layers or num_layers % pp:
        return [1]
    return [vpp for vpp in VIRTUAL_CHUNKS if num_layers // pp % vpp == 0]


def train_settings(settings: EstimateSettings, layout: dict[str, int | str]) -> TrainSettings:
    """The training settings of one layout; raises KitError as training does."""
    same = ("gpus", "nnodes", "seq_length", "global_batch_size", "pipeline_layers", "precision",
            "fp8_format", "fp8_recipe", "fused_products")  # fmt: skip
    names = (*same, "transformer_impl", "sequence_parallel", "packing", "optimizer_state", "recompute_num_layers",
             "tuner", "lora_rank", "lora_targets")  # fmt: skip
    return TrainSettings(
        save_checkpoint_path="-",
        dataset_path="-",
        train_iters=1,
        train_mode=settings.train_mode or ("finetune" if settings.packing else "pretrain"),
        **{name: getattr(settings, name) for name in names},
        **layout,  # type: ignore[arg-type]
    )


def estimate(settings: TrainSettings, qwen: QwenConfig, gpu: Gpu, work: Workload | None = None) -> Estimate:
    """The memory and speed of a run with these settings; raises KitError if training would refuse them.

    work: what `work_of` gives, from a caller that has it.
    """
    check_fit(settings, gpu.platform, qwen)
    if settings.fp8_format != "none" and gpu.name in WITHOUT_FP8:
        raise KitError(
            f"FP8_FORMAT={settings.fp8_format}: {gpu.name} has none, Hopper and later GPUs do: set it to none"
        )
    work = work or work_of(settings, gpu.platform, qwen)
    ranks = rank_memories(settings, gpu.platform, qwen, work)
    peak = max(rank.peak for rank in ranks)
    usable = gpu.memory_gib * 2**30 - bytes_beside_torch(settings, work)
    fits = "yes" if peak * RESERVED_SHARE <= usable else "tight" if peak <= usable else "no"
    found = speed(settings, work, with_rates(gpu))
    return Estimate(settings, work, ranks, fits, found if gpu.rated else None, found.step_seconds)


def balanced(one: Estimate, qwen: QwenConfig, gpu: Gpu) -> Estimate | None:
    """The layout with the PIPELINE_LAYERS of the shortest step.

    None if it has PIPELINE_LAYERS of its own, if even stages are as fast, or if they fit where these do not.
    """
    split = None if one.settings.pipeline_layers else faster_split(one.settings, one.work, gpu, one.rank_seconds)
    if split is None:
        return None
    other = estimate(replace(one.settings, pipeline_layers=split.layers), qwen, gpu, one.work)
    return other if _rank(other) < _rank(one) else None


def estimate_all(
    settings: EstimateSettings, qwen: QwenConfig, gpu: Gpu, *, even: bool = False
) -> tuple[list[Estimate], list[Refusal]]:
    """The estimate of each layout, those that fit first and the fastest of them first, and the refused layouts.

    Where PP is searched too, a layout has the PIPELINE_LAYERS that make it faster, unless its stages are to be `even`.
    Raises KitError if every layout is refused, with the reason of the first.
    """
    found, refused = [], []
    for layout in possible_layouts(settings, qwen.num_hidden_layers):
        try:
            one = estimate(train_settings(settings, layout), qwen, gpu)
            faster = balanced(one, qwen, gpu) if settings.pp is None and not even else None
            found.append(faster or one)
        except KitError as error:
            refused.append(Refusal(layout, str(error)))
    if not found:
        raise KitError(refused[0].reason)
    return sorted(found, key=_rank), refused


def without_needless_context(found: Sequence[Estimate]) -> list[Estimate]:
    """`found` less each layout that half its CP and half its micro-batch equals or beats, if that is in `found`.

    Both put as many tokens on a GPU, and the half has less to exchange.
    """
    by_layout = {_layout(one, 1): one for one in found}
    halves = (by_layout.get(_layout(one, 2)) for one in found)
    return [one for one, half in zip(found, halves, strict=True) if half is None or _rank(half) > _rank(one)]


def _layout(one: Estimate, part: int) -> tuple[str | float, ...]:
    """The layout, with a `part`-th of CP and of the micro-batch."""
    run = one.settings
    return run.tp, run.pp, run.vpp, run.recompute, run.cp / part, run.micro_batch_size / part


def _rank(one: Estimate) -> tuple[int, float]:
    """The sort key, best first: by whether it fits, then by speed if it does, else by memory."""
    order = ("yes", "tight", "no").index(one.fits)
    return order, one.rank_seconds if one.fits != "no" else one.largest.peak
