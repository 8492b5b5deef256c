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
    """Raises KitError if the first loss of a start is not what it should be, or logs that it is higher.

    A run's first loss: an error above MAX_FIRST_LOSS, a note where loaded weights are no better than random ones. A
    resumed run's: a warning where it is far above the last one before the save.
    """
    if plan.start.kind == "resume":
        _compare(plan, loss)
        return
    limit = plan.settings.max_first_loss
    if limit is not None and loss > limit:
        fail_together(f"the first loss is {loss:.4f}, above MAX_FIRST_LOSS={limit:g}: {ADVICE}")
    random_loss = math.log(plan.qwen.vocab_size)
    if plan.settings.train_mode != "dpo" and plan.start.kind == "weights" and loss > 0.9 * random_loss:
        logger.info("note: the first loss is %.2f, and random weights give %.2f: %s", loss, random_loss, ADVICE)


def _compare(plan: Plan, loss: float) -> None:
    before = plan.progress.loss
    if before is not None and loss > before + max(1.0, before / 2):
        logger.warning(
            "the loss was %.2f before iteration %d was saved, and is %.2f now: unless the data or settings changed,"
            " something is wrong; stop, look at the checkpoint (`python -m common.convert verify`), and compare the"
            " validation loss of an older one",
            before, plan.progress.iteration, loss,
        )  # fmt: skip
