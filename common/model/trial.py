"""A kernel's trial before a run: whether what it gives is there, and right."""

from collections.abc import Callable

import torch

TOLERANCE = 0.02  # of the largest value: bf16 has 8 bits
PROBED = 320  # tokens: more than one tile of every kernel


def find_fault(kernel: Callable[[], list[torch.Tensor]], exact: Callable[[], list[torch.Tensor]]) -> str:
    """Why `kernel` cannot be used; empty where its tensors are within TOLERANCE of those of `exact`, in float32."""
    try:
        found = kernel()
    except ModuleNotFoundError as error:
        return f"no module {error.name}"
    except Exception as error:  # whatever a vendor's kernel or its compiler raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    pairs = zip(found, exact(), strict=True)
    worst = max(float((mine.to(right.device).float() - right).abs().max() / right.abs().max()) for mine, right in pairs)
    return "" if worst <= TOLERANCE else f"its results are off by {worst:.1%}"
