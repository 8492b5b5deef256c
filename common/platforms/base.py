"""Platform: the facts about a kind of machine, which the rest of the kit reads instead of branching on the vendor."""

from collections.abc import Callable
from dataclasses import dataclass, field


def nothing_to_prepare() -> None:
    """Does nothing: the machine's torch works as it is."""


@dataclass(frozen=True)
class Platform:
    """What holds on a machine whatever the run; each value is explained where it is set."""

    name: str
    device: str  # torch's device type
    backend: str  # torch.distributed's backend
    transformer_impl: str  # default of TRANSFORMER_IMPL: transformer_engine or local
    transformer_engine: bool  # whether its layers can be used where it is installed
    checkpoint_format: str  # default of CKPT_FORMAT: torch_dist or torch
    fused_kernels: bool  # Megatron-Core's fused SwiGLU, bias-dropout and cross-entropy work here
    ran_on_hardware: bool
    core_attention: tuple[str, ...] = ("sdpa",)  # kinds of common.model.layers.attention: the first that works is taken
    masked_attention: bool = True  # attention takes a mask, which rows of several samples need
    unproven_formats: tuple[str, ...] = ()  # checkpoint formats that a run may use, with a warning
    oldest_cuda: str = ""  # the CUDA that torch must have been built for, or a later one; empty: any
    shared_gib: float = 1.0  # least size of /dev/shm, for the collectives' library and data workers
    version_file: str = ""  # the vendor's software writes "Version:3.5.3.20" there; empty: it writes none
    device_files: tuple[str, ...] = ()  # the driver's, without which no process reaches a device
    container_flags: str = ""  # what `docker run` needs for the devices
    prepare: Callable[[], None] = nothing_to_prepare  # called before Megatron-Core is imported
    peak_tflops: dict[str, float] = field(default_factory=dict)  # part of the device's name -> dense bf16 TFLOP/s
    memory_gib: dict[str, float] = field(default_factory=dict)  # GPU type -> its memory as torch.cuda reports it
    bandwidth_tb_s: dict[str, float] = field(default_factory=dict)  # GPU type -> TB/s of its memory
