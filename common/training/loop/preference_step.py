"""The objective of TRAIN_MODE=dpo: the loss of a micro-batch's pairs, and what is logged of them."""

from collections.abc import Callable
from typing import Any

import torch

from common.data.dataset.data_loader import Batch
from common.training.loop.answers import log_probs_of, take_answers
from common.training.loop.preference_loss import pair_losses
from common.training.settings import TrainSettings

LossFunc = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, Any]]
# Of a pair, in the order in which `preference_objective` reports their sums; the metrics are their means over pairs.
PAIR_METRICS = ("reward_chosen", "reward_rejected", "accuracy", "log_prob_chosen", "log_prob_rejected")
NUM_REPORTED = 4 + len(PAIR_METRICS)


def preference_objective(settings: TrainSettings, references: torch.Tensor | None) -> Callable[[Batch], LossFunc]:
    """The function from a micro-batch of pairs to its loss_func; references: float32 [all pairs, 2], by pair number.

    A loss_func takes losses and loss_mask of all positions, and gives (sum of the pairs' losses, number of pairs as
    int32, reporting loss [NUM_REPORTED]). Megatron-Core divides the summed gradients by that number over the global
    batch, so the loss is the mean over its pairs at any TP, PP, DP and micro-batch size. The reporting loss holds that
    sum and number, the numbers of padding positions and of answer tokens, and the sums of PAIR_METRICS. A pair without
    a loss mask, as fillers have none, counts as none.
    """

    def objective(rows: Batch) -> LossFunc:
        num_padding = int(rows.pop("num_padding").sum())
        answers = take_answers(rows)
        reference = None if references is None else references[answers.pairs]

        def loss_func(losses: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            log_probs, tokens = log_probs_of(answers, losses, loss_mask)
            expected = None if reference is None else reference.to(losses.device, non_blocking=True)
            found = pair_losses(settings, log_probs, tokens, expected)
            counts = (tokens > 0).all(1).float()
            total, number = (found.losses * counts).sum(), counts.sum()
            prefers_chosen = (found.rewards[:, 0] > found.rewards[:, 1]).float()
            metrics = torch.stack([*found.rewards.t(), prefers_chosen, *found.log_probs.t()])
            # total is copied: the schedule scales the first value in place.
            sums = [total.detach().clone(), number, torch.full_like(number, num_padding), tokens.sum()]
            return total, number.to(torch.int32), torch.cat([torch.stack(sums), metrics @ counts])

        return loss_func

    return objective


def pair_metrics(sums: list[float]) -> dict[str, float]:
    """The metrics of a reporting loss [NUM_REPORTED]: the means of PAIR_METRICS, and the mean margin of the rewards."""
    number = sums[1] or float("nan")
    means = {name: value / number for name, value in zip(PAIR_METRICS, sums[4:], strict=True)}
    return {**means, "reward_margin": means["reward_chosen"] - means["reward_rejected"]}


def log_prob_objective(rows: Batch) -> LossFunc:
    """The loss_func that reports (numbers of a micro-batch's pairs, their answers' log-probabilities [n, 2])."""
    rows.pop("num_padding")
    answers = take_answers(rows)

    def loss_func(losses: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        log_probs, _ = log_probs_of(answers, losses, loss_mask)
        total = losses.sum()
        return total, torch.ones((), dtype=torch.int32, device=losses.device), (answers.pairs, log_probs.cpu())

    return loss_func
