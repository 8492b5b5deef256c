"""Checks, before a run starts, that it fits into the memory of its devices and of this machine."""

from dataclasses import dataclass, replace
from importlib.util import find_spec

from common.errors import KitError
from common.estimate.constants import GIB
from common.estimate.memory import RankMemory, rank_memories
from common.estimate.weights import adam_bytes
from common.log import logger
from common.model.shape.parameters import num_parameters
from common.platforms import available_memory
from common.platforms.base import Platform
from common.training.checkpointing.run_folder import bytes_of_checkpoint
from common.training.loop.memory import memory_remedy
from common.training.planning.compatibility import check_fused_products
from common.training.planning.devices import smallest_device
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings
from common.training.settings.optimizer import OFFLOADED

NEAR = 0.95  # of the device's memory; the estimate leaves out CUDA's and NCCL's own and the allocator's fragmentation
STAGES_ERR = 0.07  # of the activations, with several stages (tests/unit/estimate/test_memory.py)


@dataclass(frozen=True)
class Need:
    """Bytes per GPU of the stage that needs the most."""

    peak: int  # estimated
    least: int  # the same less the estimate's largest possible error


def check_memory(plan: Plan) -> None:
    """Raises KitError if the run cannot fit its devices' memory, warns if it may not; otherwise logs both figures.

    Not for conversion, which has no estimate, nor on a CPU. Queries the devices in a subprocess, which takes seconds.
    """
    if plan.platform.device != "cuda" or plan.settings.train_or_convert_ckpt != "train":
        return
    if not plan.platform.ran_on_hardware:
        logger.info("memory: not checked, since the estimate was not validated on %s", plan.platform.name)
        return
    device = smallest_device(plan.settings.gpus)
    if device is None:
        logger.warning("memory: not checked, since torch cannot query the devices (`python -m common.doctor` says why)")
    else:
        compare_memory(plan, *device)


def check_host_memory(plan: Plan) -> None:
    """Raises KitError if what the run keeps in this machine's memory does not fit there; else logs both figures.

    That is ASYNC_SAVE's copies of a checkpoint, and an optimizer in host memory. Every rank has about the same of both.
    """
    settings = plan.settings
    if settings.train_or_convert_ckpt != "train":
        return
    needs, remedies = {}, ["use more nodes"]
    if settings.optimizer_state in OFFLOADED:
        of_model = adam_bytes(num_parameters(plan.qwen), settings.precision, settings.optimizer_state)
        needs[f"OPTIMIZER_STATE={settings.optimizer_state}"] = of_model
        if settings.optimizer_state == "cpu" and settings.precision == "bf16":
            remedies.append("OPTIMIZER_STATE=cpu_bf16, which keeps half of it")
    if settings.async_save:
        needs["the copies of ASYNC_SAVE=true"] = bytes_of_checkpoint(plan)
        remedies += ["SAVE_OPTIMIZER=false", "ASYNC_SAVE=false, which copies nothing"]
    if not needs:
        return
    here = {name: size * settings.gpus // plan.sizes.world_size for name, size in needs.items()}
    free = available_memory()
    parts = " and ".join(f"{size / GIB:.1f} GiB for {name}" for name, size in here.items())
    message = f"host memory: {parts}, and {free / GIB:.1f} GiB are free on this machine"
    if sum(here.values()) > free:
        raise KitError(f"{message}: {', or '.join(filter(None, (', '.join(remedies[:-1]), remedies[-1])))}")
    logger.info(message)


def compare_memory(plan: Plan, name: str, total_bytes: int) -> None:
    """As check_memory, for a device of that name and memory."""
    need = needed(plan)
    figures = f"about {need.peak / GIB:.1f} GiB per GPU, and {name} has {total_bytes / GIB:.1f}"
    settings = plan.settings
    layout = ", ".join(
        f"{field.upper()}={getattr(settings, field)}"
        for field in ("micro_batch_size", "seq_length", "tp", "pp", "cp", "recompute", "optimizer_state")
    )
    if need.least > total_bytes:
        raise KitError(f"{layout} need {figures}: {memory_remedy(plan)}")
    if need.peak > NEAR * total_bytes:
        logger.warning(
            "memory: %s needs %s, part of which CUDA, NCCL and fragmentation take: it may run out of memory; %s",
            layout, figures, memory_remedy(plan),
        )  # fmt: skip
    else:
        logger.info("memory: %s", figures)


def needed(plan: Plan) -> Need:
    """The memory that the run needs, with QuACK's fused GEMMs if they are installed and allowed."""
    settings = as_installed(plan.settings, plan.platform)
    error = activation_error(settings, plan.platform)
    ranks = rank_memories(settings, plan.platform, plan.qwen)
    # The estimate counts every weight as trained.
    least = 0 if plan.frozen else max(_least(rank, error) for rank in ranks)
    return Need(max(rank.peak for rank in ranks), least)


def as_installed(settings: TrainSettings, platform: Platform) -> TrainSettings:
    """`settings` with FUSED_PRODUCTS=auto decided as a run on this machine would."""
    if settings.fused_products == "auto" and find_spec("quack") and _may_fuse(settings, platform):
        return replace(settings, fused_products="true")
    return settings


def activation_error(settings: TrainSettings, platform: Platform) -> float:
    """The fraction by which activations may be overestimated; 1 where no measurement validates the estimate.

    Weights, gradients and the optimizer's state are counted to the byte.
    """
    local = (settings.transformer_impl or platform.transformer_impl) == "local"
    masked = local and (settings.packing or settings.reset_attention)
    if settings.cp > 1 or settings.fp8_format != "none" or settings.recompute == "selective" or masked or settings.lora:
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
