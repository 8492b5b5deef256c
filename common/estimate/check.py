"""Whether a run fits into the memory of its devices, checked before it starts."""

from dataclasses import dataclass, replace
from importlib.util import find_spec

from common.errors import KitError
from common.estimate.constants import GIB
from common.estimate.memory import RankMemory, rank_memory
from common.log import logger
from common.platforms import available_memory
from common.platforms.base import Platform
from common.training.checkpointing.run_folder import bytes_of_checkpoint
from common.training.loop.memory import memory_remedy
from common.training.planning.compatibility import check_fused_products
from common.training.planning.devices import smallest_device
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings

NEAR = 0.95  # of the device's memory; what CUDA, NCCL and the allocator's gaps take is not in the estimate's peak
STAGES_ERR = 0.07  # of the activations, where there are several stages (tests/unit/estimate/test_memory.py)


@dataclass(frozen=True)
class Need:
    """Bytes on the GPU of the stage that needs the most."""

    peak: int  # as the estimate says it
    least: int  # what it is even where the estimate counts as much too much as it may


def check_memory(plan: Plan) -> None:
    """Raises KitError where the run cannot go into its devices, warns where it may not; else tells both figures.

    Nothing is said of conversion, whose memory was not counted, and of a CPU. Asks a process of its own for the
    devices' memory, which takes seconds.
    """
    if plan.platform.device != "cuda" or plan.settings.train_or_convert_ckpt != "train":
        return
    if not plan.platform.ran_on_hardware:
        logger.info("memory: not checked, since the estimate was not measured on %s", plan.platform.name)
        return
    device = smallest_device(plan.settings.gpus)
    if device is None:
        logger.warning("memory: not checked, since torch does not tell the devices' memory (the doctor tells why)")
    else:
        compare_memory(plan, *device)


def check_host_memory(plan: Plan) -> None:
    """Raises KitError where the copies that ASYNC_SAVE makes of a checkpoint find no room in this machine's memory.

    Each rank copies what it writes, an even share of it but for pipeline stages, to memory that it keeps.
    """
    chosen = plan.settings
    if not chosen.async_save or chosen.train_or_convert_ckpt != "train":
        return
    needed_bytes = bytes_of_checkpoint(plan) * chosen.gpus // plan.sizes.world_size
    free = available_memory()
    told = (
        f"ASYNC_SAVE=true copies {needed_bytes / GIB:.1f} GiB to this machine's memory, where {free / GIB:.1f} are free"
    )
    if needed_bytes > free:
        raise KitError(f"{told}: use more nodes, SAVE_OPTIMIZER=false, or ASYNC_SAVE=false, which copies nothing")
    logger.info(told)


def compare_memory(plan: Plan, name: str, total_bytes: int) -> None:
    """check_memory against a device of that name and memory."""
    need = needed(plan)
    told = f"about {need.peak / GIB:.1f} GiB a GPU, and {name} has {total_bytes / GIB:.1f}"
    chosen = plan.settings
    layout = ", ".join(
        f"{field.upper()}={getattr(chosen, field)}"
        for field in ("micro_batch_size", "seq_length", "tp", "pp", "recompute", "optimizer_state")
    )
    if need.least > total_bytes:
        raise KitError(f"{layout} need {told}: {memory_remedy(plan)}")
    if need.peak > NEAR * total_bytes:
        logger.warning(
            "memory: %s needs %s, of which CUDA, NCCL and the allocator's gaps take some: it may run out; %s",
            layout, told, memory_remedy(plan),
        )  # fmt: skip
    else:
        logger.info("memory: %s", told)


def needed(plan: Plan) -> Need:
    """What the run needs, with QuACK's products where they are installed and may be used."""
    settings = plan.settings
    if settings.fused_products == "auto" and find_spec("quack") and _may_fuse(settings, plan.platform):
        settings = replace(settings, fused_products="true")
    error = may_err(settings, plan.platform)
    ranks = [rank_memory(settings, plan.platform, plan.qwen, stage) for stage in range(settings.pp)]
    return Need(max(rank.peak for rank in ranks), max(_least(rank, error) for rank in ranks))


def may_err(settings: TrainSettings, platform: Platform) -> float:
    """The share of the activations that the estimate may count too many: all of what was measured nowhere.

    Weights, gradients and the optimizer's state are counted to the byte.
    """
    local = (settings.transformer_impl or platform.transformer_impl) == "local"
    masked = local and (settings.packing or settings.reset_attention)
    if settings.cp > 1 or settings.fp8_format != "none" or settings.recompute == "selective" or masked:
        return 1.0
    return STAGES_ERR if settings.pp > 1 else 0.0


def _least(rank: RankMemory, error: float) -> int:
    return rank.state.total + rank.workspace + max(int((1 - error) * rank.activations), rank.step)


def _may_fuse(settings: TrainSettings, platform: Platform) -> bool:
    try:
        engine = (settings.transformer_impl or platform.transformer_impl) == "transformer_engine"
        check_fused_products(settings, platform, engine=engine)
    except KitError:
        return False
    return True
