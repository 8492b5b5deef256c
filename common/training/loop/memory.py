"""Device memory: its peak for the log, and the settings that reduce it when a run is out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from common.engine import transformer_engine
from common.errors import KitError, out_of_memory
from common.platforms.base import Platform
from common.training.loop.profiling import profile_folder, write_snapshot
from common.training.planning.plan import Plan
from common.training.settings.optimizer import OFFLOADED

LONG = 8192  # tokens of a row, from which on dividing its activations helps most; for speed see estimate's LONG_ROW


def memory_line() -> str:
    """The log line of this rank's peak device memory; Adam creates its moments in the first step."""
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    sizes = " / ".join(f"{size / 2**30:.1f}" for size in (allocated, reserved, total))
    return f"peak memory of rank {dist.get_rank()}, GiB allocated / reserved / total: {sizes}"


@contextmanager
def explain_out_of_memory(plan: Plan) -> Iterator[None]:
    """Turns an out-of-memory error of the block into a KitError that names the settings that reduce memory."""
    try:
        yield
    except RuntimeError as error:
        if (text := out_of_memory(error)) is None:
            raise
        if plan.settings.memory_snapshot:
            write_snapshot(profile_folder(plan), f"out_of_memory_rank_{dist.get_rank()}")
        raise KitError(f"rank {dist.get_rank()} is out of memory ({text}): {memory_remedy(plan)}") from error


def memory_remedy(plan: Plan) -> str:
    """The settings that would reduce the memory of `plan`, as the remedy of an error message."""
    settings, training = plan.settings, plan.settings.train_or_convert_ckpt == "train"
    long = training and settings.train_mode != "dpo" and settings.seq_length >= LONG
    on_gpu = plan.platform.device == "cuda"
    fp32_moments = settings.precision == "bf16" and settings.optimizer_state == "fp32"
    offloaded = settings.optimizer_state in OFFLOADED
    offloads = OFFLOADED if settings.precision == "bf16" else ("cpu",)
    options = {
        f"a MICRO_BATCH_SIZE below {settings.micro_batch_size}": training and settings.micro_batch_size > 1,
        "RECOMPUTE=full": training and settings.recompute != "full",
        "RECOMPUTE_NUM_LAYERS empty": training and settings.recompute_num_layers is not None,
        "OPTIMIZER_STATE=bf16": training and fp32_moments and supports_bf16_moments(plan.platform),
        f"OPTIMIZER_STATE={' or '.join(offloads)}": training and on_gpu and not offloaded and settings.tuner == "full",
        "TUNER=lora": settings.train_mode == "finetune" and settings.tuner == "full" and bool(plan.start.checkpoint),
        f"a SEQ_LENGTH below {settings.seq_length}": training,
        f"more GPUs, with TP over {settings.tp} or PP over {settings.pp}": True,
        f"with CP over {settings.cp}": long,
    }
    remedy = "to use less memory: " + ", ".join(option for option, applies in options.items() if applies)
    if offloaded:
        size = {"cpu": 12, "cpu_bf16": 6}[settings.optimizer_state]
        remedy += f"; OPTIMIZER_STATE={settings.optimizer_state} needs {size} bytes of host memory a parameter"
    if not on_gpu:
        return remedy
    return (
        f"{remedy}; `python -m common.estimate --hf-model-path {plan.start.model_folder} --gpu TYPE"
        f" --gpus {settings.gpus} --seq-length {settings.seq_length}` shows what fits"
    )


def supports_bf16_moments(platform: Platform) -> bool:
    """Whether OPTIMIZER_STATE=bf16 works on this machine."""
    try:
        transformer_engine.check_optimizer_state("bf16")
    except KitError:
        return False
    return platform.transformer_engine
