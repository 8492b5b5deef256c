"""Freezes the weights that a run does not train."""

import re
from typing import Any

from common.checkpoint.formats.mapping import EMBEDDING, LAYERS, OUTPUT, canonical_name
from common.model.layers.frozen import pass_gradients
from common.training.planning.frozen import Frozen


def freeze(chunks: list[Any], frozen: Frozen) -> None:
    """Takes the gradients from the weights `frozen` of this rank's chunks, before they are wrapped for training."""
    if not frozen:
        return
    for wrapped in chunks:
        chunk = getattr(wrapped, "module", wrapped)  # Float16Module
        for name, param in chunk.named_parameters():
            param.requires_grad_(_key(chunk, name) not in frozen)
        pass_gradients(chunk)


def _key(chunk: Any, name: str) -> tuple[str, int | None]:
    """The parameter's name and layer, as in `Frozen`; a tied output layer is the embedding."""
    found = re.match(re.escape(LAYERS) + r"(\d+)\.(.*)", canonical_name(name))
    if found:
        return f"{LAYERS}{{i}}.{found[2]}", chunk.decoder.layers[int(found[1])].layer_number - 1
    tied = name == OUTPUT.te and chunk.share_embeddings_and_output_weights
    return (EMBEDDING.te if tied else name), None
