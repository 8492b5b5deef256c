"""MetaX C500/C550 GPUs (maca 2.27, 3.5 to 3.8): CUDA's names over MACA, MCCL as nccl. Not run on hardware."""

from common.platforms.base import Platform

METAX = Platform(
    name="metax",
    device="cuda",  # mcPytorch keeps torch.cuda's names
    backend="nccl",  # MCCL answers to this name
    transformer_impl="local",
    transformer_engine=True,  # in some images of MACA 3; none exists for maca 2.27, which the checks notice
    checkpoint_format="torch",  # torch_dist was never seen to work in the vendor's image
    fused_kernels=False,  # they need torch.compile and Triton, which abort there on some shapes
    ran_on_hardware=False,
    memory_gib={"C500": 64.0, "C550": 64.0},  # by the data sheets; their rates are not known here
    # torch 2.1's SDPA takes no grouped heads and copies them; the image's flash_attn takes them as they are.
    core_attention=("flash_attn", "sdpa"),
    masked_attention=True,  # by SDPA, whose plain path needs no kernel of its own
    unproven_formats=("torch_dist",),
    shared_gib=8.0,  # with less, runs on MACA 3 were reported to end in SIGBUS
    version_file="$MACA_PATH/Version.txt",
    device_files=("/dev/mxcd", "/dev/dri"),
    container_flags="--device=/dev/dri --device=/dev/mxcd --group-add video",
)
