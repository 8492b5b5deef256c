"""The supported GPU types, from the platforms' tables."""

from dataclasses import dataclass, replace

from common.errors import KitError
from common.platforms import PLATFORMS
from common.platforms.base import Platform
from common.training.loop.metrics import peak_tflops

MEASURED = ("H100", "H200")  # the types that the constants are fitted to
ASSUMED = "A100"  # whose rates compare the layouts of a GPU whose own are unknown
WITHOUT_FP8 = ("A100", "A100 40GB", "A800", "A10", "C500", "C550")  # Ada, Hopper and later GPUs have it


@dataclass(frozen=True)
class Gpu:
    """A GPU type. Without the rates of its data sheet (`rated`) its speed is not estimated."""

    name: str
    platform: Platform
    memory_gib: float  # as torch.cuda reports it
    flops: float  # dense bf16 FLOP/s; 0: unknown
    bandwidth: float  # memory bandwidth in bytes/s; 0: unknown

    @property
    def rated(self) -> bool:
        """Whether both rates are known."""
        return self.flops > 0 and self.bandwidth > 0


def with_rates(gpu: Gpu) -> Gpu:
    """`gpu`, with the rates of ASSUMED where its own are unknown."""
    return gpu if gpu.rated else replace(find_gpu(ASSUMED), platform=gpu.platform)


def gpu_of_device(name: str, total_bytes: int, platform: Platform) -> Gpu:
    """The GPU type of a device by torch's name of it, with its own memory; without rates where the type is unknown."""
    known = [each for each in platform.memory_gib if each in name]
    if not known:
        return Gpu(name, platform, total_bytes / 2**30, 0, 0)
    return find_gpu(max(known, key=len), total_bytes / 2**30)


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """The GPU type of that name, in any case, "RTX" or not, with `memory_gib` if given.

    Raises KitError if it is unknown.
    """
    for platform in PLATFORMS.values():
        for known, own in platform.memory_gib.items():
            if name.lower() in (known.lower(), known.lower().removeprefix("rtx ")):
                flops = 1e12 * (peak_tflops(platform, known) or 0)
                return Gpu(known, platform, memory_gib or own, flops, 1e12 * platform.bandwidth_tb_s.get(known, 0))
    types = [known for platform in PLATFORMS.values() for known in platform.memory_gib]
    raise KitError(
        f"--gpu {name} is not known: use one of {', '.join(types)}, or the nearest of them with its --memory-gib"
    )
