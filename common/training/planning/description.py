"""What a run's plan says in the log before it starts."""

from pathlib import Path

from common.checkpoint.formats.model_files import PROFILE_FOLDER
from common.checkpoint.formats.parallel_layout import model_tensors
from common.data.dataset.named_datasets import NamedDatasets
from common.engine.overrides import describe_overrides
from common.log import logger
from common.training.planning.plan import Plan
from common.training.planning.schedule import describe_schedule
from common.training.settings import mode_defaults

MANY_EPOCHS = 16  # "Scaling Data-Constrained Language Models", section 6: repeats are worth little from here on


def describe(plan: Plan) -> None:
    """Logs the plan, one line per subject."""
    sizes, settings, start = plan.sizes, plan.settings, plan.start
    logger.info(
        "%s: %d processes = TP %d x PP %d x CP %d x DP %d, %s layers, %s",
        plan.platform.name, sizes.world_size, sizes.tp, sizes.pp, sizes.cp, sizes.dp, plan.transformer_impl,
        settings.precision,
    )  # fmt: skip
    if not plan.platform.ran_on_hardware:
        logger.info("note: this kit was not run on %s hardware", plan.platform.name)
    if plan.ckpt_format in plan.platform.unproven_formats:
        logger.warning(
            "CKPT_FORMAT=%s was not run on %s hardware: keep the initial weights; the default there is %s",
            plan.ckpt_format, plan.platform.name, plan.platform.checkpoint_format,
        )  # fmt: skip
    for line in describe_overrides(settings.mcore):
        logger.info(line)
    source = start.checkpoint.path if start.checkpoint else start.model_folder
    logger.info("start: %s from %s", start.kind, source)
    if plan.adapters:
        logger.info(plan.adapters.description)
    if plan.frozen:
        logger.info("frozen: %d of %d weight tensors", len(plan.frozen), len(model_tensors(plan.qwen)))
    if plan.train:
        _describe_defaults(plan)
        logger.info(
            "data: %d samples of %d tokens an epoch; validation: %s",
            plan.train.samples_per_epoch, settings.seq_length,
            f"{plan.valid.samples_per_epoch} samples" if plan.valid else "none",
        )  # fmt: skip
        _describe_length(plan, plan.train.samples_per_epoch)
        if settings.packing:
            packed = plan.train.documents_per_sample
            logger.info(
                "packing: a sample is a row of %.1f %s on average, %.0f%% full; a step has about %s of them",
                packed, "pairs" if settings.train_mode == "dpo" else "conversations", 100 * plan.train.filled,
                f"{packed * settings.global_batch_size:,.0f}",
            )  # fmt: skip
        if settings.train_mode != "pretrain" and not settings.packing and plan.train.filled < 0.5:
            logger.info(
                "rows are %.0f%% full, the rest is padding: PACKING=true puts several samples into one",
                100 * plan.train.filled,
            )
    if isinstance(plan.valid, NamedDatasets):
        for name, number in plan.valid.sizes.items():
            logger.info("validation: %s: %d samples, each evaluation takes all of them", name, number)


def _describe_length(plan: Plan, samples_per_epoch: int) -> None:
    settings, done = plan.settings, plan.progress
    logger.info(
        "length: %d steps of %d samples = %.2f epochs",
        plan.train_iters - done.iteration, settings.global_batch_size,
        (plan.train_samples - done.consumed_samples) / samples_per_epoch,
    )  # fmt: skip
    logger.info("learning rate: %s", describe_schedule(settings, plan.train_iters, plan.train_samples))
    if settings.profile_steps:
        _describe_profile(plan, *settings.profile_steps)
    epochs = plan.train_samples / samples_per_epoch
    if epochs > MANY_EPOCHS:
        logger.info(
            "note: the run passes over the data %s times; more than %d add little (arXiv 2305.16264): EPOCHS and"
            " TRAIN_ITERS set the length",
            f"{epochs:,.0f}", MANY_EPOCHS,
        )  # fmt: skip


def _describe_profile(plan: Plan, first: int, last: int) -> None:
    settings, done = plan.settings, plan.progress.iteration
    if last <= done or first > plan.train_iters:
        logger.warning(
            "PROFILE=%s: no step is traced, since the run goes from step %d to %d",
            settings.profile, done + 1, plan.train_iters,
        )  # fmt: skip
        return
    ranks = "all ranks" if settings.profile_ranks == "all" else f"rank {settings.profile_ranks}"
    logger.info(
        "profile: steps %d to %d of %s, to %s",
        max(first, done + 1), last, ranks, Path(settings.save_checkpoint_path) / PROFILE_FOLDER,
    )  # fmt: skip


def _describe_defaults(plan: Plan) -> None:
    settings = plan.settings
    found = mode_defaults.taken(settings)
    if found:
        shown = ", ".join(f"{name.upper()}={str(value).lower()}" for name, value in found.items())
        logger.info("defaults of TRAIN_MODE=%s: %s", settings.train_mode, shown)
    if plan.start.kind == "random" and "lr" in found:
        logger.info(
            "note: LR=%g is for continuing from trained weights; Qwen's own training from random ones has %g",
            settings.lr, mode_defaults.FROM_RANDOM,
        )  # fmt: skip
