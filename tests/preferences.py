"""Pairs of answers for the tests of preference training, and Hugging Face's model on them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from common.data.dataset.indexed_dataset import open_mask, open_tokens
from common.data.dataset.manifest import resolve


def pair_rows(number: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows from number `first` on, whose prompts and answers have different lengths, some answers of one token."""
    return [
        {
            "prompt": f"What is {i}+{i}?" * (1 + i % 2),
            "chosen": f"{2 * i}" + " It is so." * (i % 3),
            "rejected": f"{3 * i + 1}" + " No idea, sorry." * (i % 4),
        }
        for i in range(first, first + number)
    ]


def write_pairs(path: Path, number: int, first: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(number, first)), encoding="utf-8")
    return path


def documents(dataset: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, loss mask) of each document of a dataset: chosen, rejected, chosen, ..."""
    files = resolve(str(dataset))
    assert files.loss_mask
    tokens, masks = open_tokens(files.tokens), open_mask(files.loss_mask)
    return [
        (torch.from_numpy(tokens[i].astype("int64")), torch.from_numpy(masks[i].astype("float32")))
        for i in range(len(tokens))
    ]


def log_probs(model: Qwen2ForCausalLM, dataset: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability, number of tokens) of each answer by Hugging Face's model, [pairs, 2]."""
    sums, numbers = [], []
    for ids, mask in documents(dataset):
        logits = model(ids[None, :-1]).logits[0]
        each = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        sums.append((each * mask[1:]).sum())
        numbers.append(mask[1:].sum())
    return torch.stack(sums).view(-1, 2), torch.stack(numbers).view(-1, 2)
