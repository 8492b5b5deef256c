"""DETERMINISTIC=true: bitwise identical results on the same number of the same GPUs, with slower kernels.

Operations whose order of summation changes between runs, and their replacements:

- Attention's gradient of the queries, accumulated over blocks of keys with atomic adds. FlashAttention 2 and 4 get
  `deterministic=True` (model/layers/attention.py). PyTorch skips cuDNN and uses its own deterministic kernels.
  Transformer Engine selects its deterministic backends (get_attention_backend in dot_product_attention/utils.py, 2.11:
  cuDNN on Hopper but not on Blackwell, FlashAttention from 2.4.1, its unfused attention). A kernel without such an
  argument, or whose probe is not reproducible, is skipped with a log line.
- The embedding's gradient, which newer torch computes with atomic adds: torch's sort-based kernel
  (common/model/build.py explains why not Megatron-Core's index-based one).
- NCCL, which may select tree or in-switch (NVLS) reductions: rings.
- cuBLAS on several streams, which may use different workspaces: a fixed workspace
  (docs.nvidia.com/cuda/cublas, "Results reproducibility").
- TP_COMM_OVERLAP, which may reduce in the NVLink switches (multimem.ld_reduce in Transformer Engine's
  userbuffers.cu): refused.

The kit's loss, norms, SwiGLU and QKV kernels, QuACK's matrix products, the gradient norm and Adam always sum in a fixed
order (common/model/kernels/selection.py). Results differ between GPU models, numbers of GPUs and package versions.

Megatron-LM's --deterministic-mode requires the same environment and calls the same torch function (validate_args in
megatron/training/arguments.py). It refuses fused cross-entropy and FlashAttention; those used here are deterministic.
"""

import os

from common.errors import KitError
from common.training.settings import TrainSettings

# Accepted values of each variable, the default first; those of NCCL_ALGO are Megatron-LM's.
ALLOWED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def environment() -> dict[str, str]:
    """The variables that each rank needs before CUDA and NCCL are initialized; accepted values already set are kept.

    Raises KitError for a variable set to a value that is not deterministic.
    """
    variables = {}
    for name, values in ALLOWED.items():
        variables[name] = os.environ.get(name) or values[0]
        if variables[name] not in values:
            raise KitError(
                f"{name}={variables[name]} with DETERMINISTIC=true: unset it, or set it to {' or '.join(values)}"
            )
    return variables


def check(settings: TrainSettings) -> None:
    """Raises KitError where DETERMINISTIC=true is set and the run cannot be deterministic."""
    if not settings.deterministic:
        return
    environment()
    if settings.tp_comm_overlap == "true":
        raise KitError(
            "DETERMINISTIC=true and TP_COMM_OVERLAP=true, whose reductions are not deterministic: set it to auto"
        )


def apply() -> None:
    """Restricts torch in this rank to deterministic algorithms, or errors without one; call before building a model.

    Turns off torch's filling of uninitialized memory, a debugging aid that costs a write of every tensor.
    """
    import torch

    os.environ.update(environment())
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    filling = getattr(torch.utils, "deterministic", None)  # from torch 2.2 on
    if filling is not None:
        filling.fill_uninitialized_memory = False
