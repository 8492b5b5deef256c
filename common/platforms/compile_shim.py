"""Imports Megatron-Core with its fused functions left as they are written, instead of given to torch.compile.

A run on a CPU calls none of them (`fused_kernels`), and for the first one torch.compile imports its compiler: two
fifths of a rank's start.
"""

from importlib import import_module
from typing import Any

import torch

# They import every module that a run needs and that has fused functions (`jit_fuser` in megatron/core/jit.py).
MODULES = ("megatron.core", "megatron.core.models.gpt")


def import_megatron() -> None:
    """Imports `MODULES`; torch.compile itself is as before afterwards."""
    original = torch.compile
    torch.compile = _uncompiled
    try:
        for name in MODULES:
            import_module(name)
    finally:
        torch.compile = original


def _uncompiled(model: Any = None, **_: Any) -> Any:
    """What torch.compile(model) or @torch.compile(...) gives here: the function itself."""
    return model if model is not None else _uncompiled
