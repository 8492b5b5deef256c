"""NVIDIA GPUs, in NGC's PyTorch image or beside a newer PyTorch."""

from common.platforms.base import Platform

NVIDIA = Platform(
    name="nvidia",
    device="cuda",
    backend="nccl",
    transformer_impl="transformer_engine",
    transformer_engine=True,
    checkpoint_format="torch_dist",
    fused_kernels=True,
    core_attention=("flash_attn_4", "sdpa"),
    ran_on_hardware=True,
    oldest_cuda="12.4",  # NGC 24.03's, the oldest that the kit's pins were put together for
    device_files=("/dev/nvidiactl", "/dev/nvidia-uvm"),
    container_flags="--gpus all",
    # Dense bf16 by NVIDIA's data sheets (the sparse figures are twice as high), SXM boards where nothing else is said.
    peak_tflops={
        "H200": 989.0,
        "H100": 989.0,
        "H100 NVL": 835.0,
        "H100 PCIe": 756.0,
        "H800": 989.0,
        "H800 PCIe": 756.0,
        "A100": 312.0,
        "A800": 312.0,
        "H20": 148.0,
        "B200": 2250.0,
        "L40S": 362.0,
        "RTX 4090": 165.2,  # with float32 sums: NVIDIA's Ada architecture white paper
        "A10": 125.0,
    },
    # The total of torch's out-of-memory messages, which lies a little below the data sheet's.
    memory_gib={
        "H200": 139.7,
        "H100": 79.1,
        "H100 NVL": 93.0,
        "H100 PCIe": 79.1,
        "H800": 79.1,
        "H800 PCIe": 79.1,
        "A100": 79.1,
        "A100 40GB": 39.4,
        "A800": 79.1,
        "H20": 95.0,
        "B200": 178.3,
        "L40S": 44.4,
        "RTX 4090": 23.6,
        "A10": 22.1,
    },
    # By the data sheets too.
    bandwidth_tb_s={
        "H200": 4.8,
        "H100": 3.35,
        "H100 NVL": 3.9,
        "H100 PCIe": 2.0,
        "H800": 3.35,
        "H800 PCIe": 2.0,
        "A100": 2.04,
        "A100 40GB": 1.56,
        "A800": 2.04,
        "H20": 4.0,
        "B200": 8.0,
        "L40S": 0.864,
        "RTX 4090": 1.008,
        "A10": 0.6,
    },
)
