"""What the tests train and convert: a random Qwen2.5 folder with a small real tokenizer."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.demo.model import Shape, write_model
from common.demo.tokenizer import write_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. 12 + 30 = 42.",
    "今天天气很好，我们去公园散步吧。你好，世界！",
    "def add(a, b):\n    return a + b\n",
    "What is the capital of France? Paris. 法国的首都是巴黎。",
]


def tiny_qwen(folder: Path, *, std: float = 0.1, spread: float = 0.1, seed: int = 0, **shape: int | bool) -> Path:
    """A folder with config, tokenizer and random weights of std 0.1, whose norms and biases matter."""
    tokenizer = write_tokenizer(folder, TEXTS * 4, vocab_size=400)
    assert tokenizer.get_vocab_size() <= Shape.vocab_size
    write_model(folder, replace(Shape(), **shape), tokenizer, std=std, spread=spread, seed=seed)
    return folder


def write_ramps(prefix: Path, num_documents: int, num_tokens: int) -> Path:
    """`prefix`, of a dataset of uint16 whose document k is the `num_tokens` tokens k, k + 1, ..."""
    with IndexedDatasetBuilder(prefix, np.dtype(np.uint16)) as writer:
        for start in range(num_documents):
            writer.add_document(np.arange(start, start + num_tokens, dtype=np.uint16))
    return prefix
