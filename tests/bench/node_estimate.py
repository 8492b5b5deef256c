"""What `common.estimate` says of a row of bench_node: its rate and memory, and the stages that it proposes."""

import argparse
import os
from typing import Any

import torch

from common.estimate.balance import faster_split
from common.estimate.check import as_installed
from common.estimate.gpus import Gpu, gpu_of_device
from common.estimate.layouts import estimate
from common.estimate.memory import work_of
from common.model.shape.config import QwenConfig
from common.platforms import PLATFORMS, detect
from common.settings import add_options, from_namespace
from common.training.settings import TrainSettings
from tests.bench.bench_training import words


def gpu_here() -> Gpu | None:
    """This machine's type of GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    platform = PLATFORMS[os.environ.get("KIT_PLATFORM") or detect()]
    return gpu_of_device(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], platform)


def settings_of(flags: dict[str, Any], gpu: Gpu) -> TrainSettings:
    """The settings of flags of `common.train` without paths, with the packages that are installed here."""
    parser = argparse.ArgumentParser()
    add_options(parser, TrainSettings)
    given = {**flags, "dataset-path": "-", "save-checkpoint-path": "-", "train-iters": 1}
    return as_installed(from_namespace(TrainSettings, parser.parse_args(words(given))), gpu.platform)


def balanced_layers(qwen: QwenConfig, flags: dict[str, Any]) -> dict[str, str]:
    """The flag of the PIPELINE_LAYERS that the launcher would propose for `flags`; none if even stages are as fast."""
    gpu = gpu_here()
    if gpu is None:
        return {}
    settings = settings_of(flags, gpu)
    split = faster_split(settings, work_of(settings, gpu.platform, qwen), gpu)
    return {"pipeline-layers": split.layers} if split else {}


def estimated(qwen: QwenConfig, flags: dict[str, Any], gpus: int) -> dict[str, float]:
    """What the estimate says of `flags`: tokens/s a GPU and GiB; nothing on a CPU."""
    gpu = gpu_here()
    if gpu is None:
        return {}
    found = estimate(settings_of(flags, gpu), qwen, gpu)
    speed = {"estimated_tokens_per_s_gpu": round(found.speed.tokens_per_second / gpus)} if found.speed else {}
    return {**speed, "estimated_gib": round(found.largest.peak / 2**30, 1)}
