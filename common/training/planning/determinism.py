"""DETERMINISTIC=true: the same command gives the same bits on the same number of the same GPUs, by slower kernels.

What adds up in an order that is another one in each run, and what is taken in its place:

- Attention's gradients of queries, to which blocks of keys add as they come: FlashAttention 2 and 4 are told to keep an
  order (`deterministic`, model/layers/attention.py), PyTorch's leaves cuDNN's out and keeps one in its own, Transformer
  Engine takes its deterministic backends (get_attention_backend in its dot_product_attention/utils.py, 2.11: cuDNN's on
  Hopper, FlashAttention from 2.4.1 on, its unfused one; on Blackwell not cuDNN's). A kernel whose trial does not give
  the same bits again, or that has no such argument, is passed over with a line.
- The embedding's gradient, by atomic adds in newer torch: torch's own that sorts first (common/model/build.py says why
  not Megatron-Core's, by index).
- NCCL, which may choose trees or switches that add (NVLS): rings.
- cuBLAS with several streams, which may find another workspace: a fixed one
  (docs.nvidia.com/cuda/cublas, "Results reproducibility").
- TP_COMM_OVERLAP, which may leave sums to the switches between GPUs (multimem.ld_reduce in Transformer Engine's
  userbuffers.cu): refused.

The loss, norms, SwiGLU and QKV of the kit, QuACK's products, the gradient's norm and Adam add in one order anyway
(common/model/kernels/selection.py). Other GPUs, numbers of GPUs, or versions of packages give other bits.

Megatron-LM's --deterministic-mode asks for the same environment and calls the same function of torch (validate_args in
megatron/training/arguments.py), and refuses fused cross-entropy and FlashAttention, of which ours keep an order.
"""

import os

from common.errors import KitError
from common.training.settings import TrainSettings

# Each variable: what is set, and what else a user may have set; NCCL_ALGO as Megatron-LM allows it.
ALLOWED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def environment() -> dict[str, str]:
    """What the environment of each rank needs before CUDA and NCCL begin; what is set and as good stays.

    Raises KitError for a variable that is set to what gives other bits in each run.
    """
    wanted = {}
    for name, values in ALLOWED.items():
        wanted[name] = os.environ.get(name) or values[0]
        if wanted[name] not in values:
            raise KitError(
                f"{name}={wanted[name]} with DETERMINISTIC=true: the environment must leave it out, or set it to"
                f" {' or '.join(values)}"
            )
    return wanted


def check(settings: TrainSettings) -> None:
    """Raises KitError where a deterministic run is asked for with what cannot be one."""
    if not settings.deterministic:
        return
    environment()
    if settings.tp_comm_overlap:
        raise KitError("DETERMINISTIC=true and TP_COMM_OVERLAP=true, whose sums keep no order: set one to false")


def apply() -> None:
    """Has this rank's torch take deterministic algorithms alone, and raise where it has none; before a model is built.

    Memory is not filled before use, torch's default with them: it finds reads of what was never written and costs a
    write of every tensor.
    """
    import torch

    os.environ.update(environment())
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    filling = getattr(torch.utils, "deterministic", None)  # from torch 2.2 on
    if filling is not None:
        filling.fill_uninitialized_memory = False
