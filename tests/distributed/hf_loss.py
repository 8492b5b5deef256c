"""The loss of a step of fine-tuning by a Hugging Face model, on the samples that training takes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.data.dataset.builder import build_dataset, split_documents
from common.data.dataset.manifest import resolve

BATCH = 8


def hf_loss(model: Any, work: Path, batch: int, *, packing: bool = True) -> torch.Tensor:
    """The loss of step `batch`, from 0, each document on its own."""
    files = resolve(str(work / "sft"))
    documents, _ = split_documents(200, "98,2,0")
    samples = build_dataset(files, train_mode="finetune", seq_length=96, seed=1234, documents=documents,
                            packing=packing)  # fmt: skip
    total, number = torch.zeros(()), 0.0
    for index in range(batch * BATCH, (batch + 1) * BATCH):
        sample = samples[index]
        segments = sample.get("segment_ids", np.zeros(96))
        for segment in np.unique(segments):
            tokens, labels, mask = (
                torch.from_numpy(sample[key][segments == segment]) for key in ("tokens", "labels", "loss_mask")
            )
            losses = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0], labels, reduction="none")
            total, number = total + (losses * mask).sum(), number + float(mask.sum())
    return total / number
