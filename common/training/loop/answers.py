"""The answers in a micro-batch of pairs: where they lie among its positions, and the log-probability of each.

Letters: b samples, n pairs of the micro-batch, s positions of a sample.
"""

from typing import NamedTuple

import torch

from common.data.dataset.data_loader import Batch
from common.data.dataset.preference_dataset import NO_PAIR


class Answers(NamedTuple):
    """lengths: of the runs of positions that a micro-batch consists of, in order; is_answer: which are no padding.

    The answers of pair k are the (2 k)-th run that is one, chosen, and the next, rejected. pairs: int64 [n], on the
    CPU, their numbers.
    """

    lengths: list[int]
    is_answer: list[bool]
    pairs: torch.Tensor


def take_answers(rows: Batch) -> Answers:
    """The answers of a micro-batch of a PreferenceDataset, whose "pairs" are taken out of it.

    With segment_ids [b, s] an answer is a run of equal ids; otherwise it is one half of a sample.
    """
    pairs = rows.pop("pairs")
    numbers = pairs[pairs != NO_PAIR]
    if "segment_ids" not in rows:
        half = rows["labels"].shape[1] // 2
        return Answers([half] * 2 * len(pairs), [True] * 2 * len(pairs), numbers)
    lengths, is_answer = list[int](), list[bool]()
    for segments, own in zip(rows["segment_ids"], pairs, strict=True):
        ids, counts = segments.unique_consecutive(return_counts=True)
        lengths += counts.tolist()
        is_answer += (ids < 2 * int((own != NO_PAIR).sum())).tolist()
    return Answers(lengths, is_answer, numbers)


def log_probs_of(answers: Answers, losses: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability, number of tokens) of each answer, float32 [n, 2] both: chosen, rejected.

    losses: each token's loss times loss_mask, of all positions of the micro-batch in their order.
    """
    log_probs, tokens = (_sums(answers, values) for values in (-losses.flatten(), loss_mask.flatten()))
    return log_probs, tokens


def _sums(answers: Answers, values: torch.Tensor) -> torch.Tensor:
    """float32 [n, 2]: the sum of `values` over each answer, in the same order of additions in every run."""
    runs = zip(values.split(answers.lengths), answers.is_answer, strict=True)
    return torch.stack([run.sum() for run, is_answer in runs if is_answer]).view(-1, 2)
