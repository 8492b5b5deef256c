"""What a run says of its device's memory, and what takes less when it runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from common.engine import transformer_engine
from common.errors import KitError
from common.platforms.base import Platform
from common.training.planning.plan import Plan

# As torch, CUDA, NCCL, cuBLAS and the allocator of the CPU tell it, all of them in a RuntimeError.
SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def memory_line() -> str:
    """What the log says of this rank's device memory; Adam makes its moments at the end of the first step."""
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    share = " / ".join(f"{size / 2**30:.1f}" for size in (allocated, reserved, total))
    return f"memory of rank {dist.get_rank()} at most, GiB allocated / reserved / there are: {share}"


@contextmanager
def explained_lack_of_memory(plan: Plan) -> Iterator[None]:
    """Raises KitError, which names what takes less, where the block runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS):
            raise
        # torch's text goes on with where its documentation is, or with lines of C++.
        text = str(error).split("  See documentation")[0].strip().splitlines()[0].rstrip(".")
        raise KitError(f"rank {dist.get_rank()} is out of memory ({text}): {what_takes_less(plan)}") from error


def what_takes_less(plan: Plan) -> str:
    """The settings of `plan` that can still be changed for it."""
    settings, training = plan.settings, plan.settings.train_or_convert_ckpt == "train"
    on_gpu = plan.platform.device == "cuda"
    halved = settings.precision == "bf16" and settings.optimizer_state == "fp32" and has_bf16_moments(plan.platform)
    ways = {
        f"a MICRO_BATCH_SIZE below {settings.micro_batch_size}": training and settings.micro_batch_size > 1,
        "RECOMPUTE=full": training and settings.recompute != "full",
        "RECOMPUTE_NUM_LAYERS empty": training and settings.recompute_num_layers is not None,
        "OPTIMIZER_STATE=bf16": training and halved,
        "OPTIMIZER_STATE=cpu": training and on_gpu and settings.optimizer_state != "cpu",
        f"a SEQ_LENGTH below {settings.seq_length}": training,
        f"more GPUs, with TP over {settings.tp} or PP over {settings.pp}": True,
    }
    told = "what takes less: " + ", ".join(way for way, is_left in ways.items() if is_left)
    if settings.optimizer_state == "cpu":
        told += "; OPTIMIZER_STATE=cpu needs 12 bytes a parameter of the hosts' memory"
    if not on_gpu:
        return told
    return (
        f"{told}; `python -m common.estimate --hf-model-path {plan.start.model_folder} --gpu TYPE"
        f" --gpus {settings.gpus} --seq-length {settings.seq_length}` tells what fits"
    )


def has_bf16_moments(platform: Platform) -> bool:
    """Whether OPTIMIZER_STATE=bf16 would be taken here."""
    try:
        transformer_engine.check_optimizer_state("bf16")
    except KitError:
        return False
    return platform.transformer_engine
