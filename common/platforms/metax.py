"""MetaX C500/C550 GPUs (maca 2.27): CUDA's names over MACA, MCCL behind the name nccl. Not run on hardware."""

from common.platforms.base import Platform

METAX = Platform(
    name="metax",
    device="cuda",  # mcPytorch keeps torch.cuda's names
    backend="nccl",  # MCCL answers to this name
    transformer_impl="local",
    transformer_engine=False,  # none exists for maca 2.27
    checkpoint_format="torch",  # torch_dist was never seen to work in the vendor's image
    fused_kernels=False,  # they need torch.compile and Triton, which abort there on some shapes
    ran_on_hardware=False,
    memory_gib={"C500": 64.0, "C550": 64.0},  # by the data sheets; their rates are not known here
    # torch 2.1's SDPA takes no grouped heads and copies them; the image's flash_attn takes them as they are.
    core_attention=("flash_attn", "sdpa"),
    masked_attention=True,  # by SDPA, whose plain path needs no kernel of its own
    unproven_formats=("torch_dist",),
    device_files=("/dev/mxcd", "/dev/dri"),
    container_flags="--device=/dev/dri --device=/dev/mxcd --group-add video",
)
