"""The losses of preference pairs: DPO, IPO and ORPO.

    h = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))

    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e being DPO_LABEL_SMOOTHING
             arXiv 2305.18290, equation 7
    ipo      (h - 1 / (2 beta))^2, log p being means over tokens
             arXiv 2310.12036, equation 17
    orpo     -log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds being p / (1 - p) and
             log p means over tokens; no reference
             arXiv 2403.07691, equations 1, 3, 6 and 7

Label smoothing is that of conservative DPO (github.com/eric-mitchell/direct-preference-optimization, trainers.py).
The paper's IPO takes sums over tokens; means, as in trl and LLaMA-Factory, keep long answers from dominating it.
With DPO_SFT_WEIGHT, sigmoid and ipo add that weight times -log p(chosen) / tokens, the mean over the tokens of the
pair's own chosen answer (arXiv 2404.19733, equation 1), so that each pair weighs the same whatever its length.

Letters: n pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.training.settings.preference import PreferenceSettings


class PairLosses(NamedTuple):
    """losses float32 [n]; rewards and log_probs float32 [n, 2], chosen and rejected, without gradients.

    A reward is beta (log p - log p_ref), for orpo beta log p. They are means over tokens where the loss takes means.
    """

    losses: torch.Tensor
    rewards: torch.Tensor
    log_probs: torch.Tensor


def pair_losses(
    settings: PreferenceSettings, log_probs: torch.Tensor, tokens: torch.Tensor, reference: torch.Tensor | None
) -> PairLosses:
    """The losses of pairs whose answers have the log-probabilities and the numbers of tokens [n, 2].

    reference: those of the reference model, sums over tokens too; None for orpo.
    """
    beta, tokens = settings.dpo_beta, tokens.clamp(min=1)
    per_token = log_probs / tokens
    if settings.dpo_loss == "orpo":
        odds = per_token - _log_of_one_minus_exp(per_token)
        losses = -per_token[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
        return PairLosses(losses, beta * per_token.detach(), per_token.detach())
    assert reference is not None
    ratios = log_probs - reference
    if settings.dpo_loss == "ipo":
        ratios, log_probs = ratios / tokens, per_token
    h = ratios[:, 0] - ratios[:, 1]
    if settings.dpo_loss == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        smooth = settings.dpo_label_smoothing
        losses = -(1 - smooth) * F.logsigmoid(beta * h) - smooth * F.logsigmoid(-beta * h)
    if settings.dpo_sft_weight:
        losses = losses - settings.dpo_sft_weight * per_token[:, 0]
    return PairLosses(losses, beta * ratios.detach(), log_probs.detach())


def _log_of_one_minus_exp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(values)) of negative values, exact near 0 and far from it.

    By the better of two forms on each side of -log 2 (Maechler, "Accurately Computing log(1 - exp(-|a|))", 2012). A
    value of 0, a probability of 1, counts as the float32 below it.
    """
    values = values.clamp(max=-torch.finfo(torch.float32).eps)
    near = values > -0.6931471805599453
    # where() passes the gradient of both branches, so that each needs values that are finite in it
    close = torch.log(-torch.expm1(torch.where(near, values, -0.5)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, values)))
    return torch.where(near, close, far)
