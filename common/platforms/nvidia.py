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
    ran_on_hardware=True,
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
    },
)
