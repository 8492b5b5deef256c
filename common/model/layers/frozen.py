"""Weights without gradients."""

from typing import Any


def pass_gradients(model: Any) -> None:
    """Has the embeddings of `model`, a chunk with frozen weights, put out what needs gradients.

    Recomputation runs a backward pass only through a function of which an input needs gradients, and a pipeline stage
    only from an output that does.
    """
    if model.pre_process:
        model.embedding.register_forward_hook(_need_gradients)


def _need_gradients(module: Any, inputs: Any, out: Any) -> Any:
    return out if out.requires_grad else out.requires_grad_()
