"""The check of a run's first loss, which shows whether the weights fit the model and the data."""

import math

from common.log import logger
from common.training.launching.process_group import fail_together
from common.training.planning.plan import Plan

ADVICE = (
    "a wrong tokenizer, rms_norm_eps or rope_theta shows here; compare the converted weights with the model's by"
    " `python -m common.convert verify --logits true`"
)


def check_first_loss(plan: Plan, loss: float) -> None:
    """Raises KitError if the first loss is above MAX_FIRST_LOSS; logs loaded weights no better than random ones."""
    limit = plan.settings.max_first_loss
    if limit is not None and loss > limit:
        fail_together(f"the first loss is {loss:.4f}, above MAX_FIRST_LOSS={limit:g}: {ADVICE}")
    random_loss = math.log(plan.qwen.vocab_size)
    if plan.start.kind == "weights" and loss > 0.9 * random_loss:
        logger.info("note: the first loss is %.2f, and random weights give %.2f: %s", loss, random_loss, ADVICE)
