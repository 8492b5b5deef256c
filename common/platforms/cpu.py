"""A machine without a GPU: Megatron-Core runs unmodified on gloo, with a shim for `torch.cuda`."""

from common.platforms.base import Platform


def _prepare() -> None:
    from common.platforms import compile_shim, cuda_shim, gloo_shim  # import torch, which reading the facts must not

    gloo_shim.install()  # first: Megatron-Core takes torch's collectives by name
    compile_shim.import_megatron()
    cuda_shim.install()  # last: its mode makes torch import the compiler


CPU = Platform(
    name="cpu",
    device="cpu",
    backend="gloo",
    transformer_impl="local",
    transformer_engine=False,  # it has no CPU kernels
    checkpoint_format="torch_dist",
    fused_kernels=False,  # they are torch.compile'd: minutes of compilation for no gain here
    ran_on_hardware=True,
    prepare=_prepare,
)
