"""What a run will do, settled and checked in one process before any other starts."""

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from common.checkpoint.formats.layout import Checkpoint, find_checkpoint
from common.checkpoint.formats.origin import check_ranks, description_of
from common.checkpoint.verification.harmless import check_harmless
from common.data.dataset.blended_dataset import BlendedDataset
from common.data.dataset.sample_dataset import SampleDataset
from common.data.dataset.shuffle import order_name
from common.engine.dist_checkpointing import check_optimizer_sharding
from common.engine.installation import check_installed
from common.engine.overrides import describe_overrides, overrides
from common.errors import KitError
from common.log import logger
from common.model.shape.config import QwenConfig, load_config
from common.parallel import ParallelSizes
from common.platforms.base import Platform
from common.training.planning.compatibility import check_fit
from common.training.planning.datasets import content_hash, open_data
from common.training.planning.deadline import STARTED
from common.training.settings import TrainSettings


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    iteration: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from, and the folder whose config.json and tokenizer it carries along.

    kind: "resume" (weights, optimizer, schedule, random state, position), "weights" (iteration 0) or "random".
    """

    kind: str
    model_folder: Path
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Plan:
    """A run's settings with all that follows from them."""

    settings: TrainSettings
    platform: Platform
    sizes: ParallelSizes
    qwen: QwenConfig
    start: Start
    transformer_impl: str
    ckpt_format: str
    train: SampleDataset | None
    valid: SampleDataset | None
    train_iters: int
    progress: Progress = Progress()
    data_hash: str = ""

    @property
    def train_samples(self) -> int:
        """Samples that the run will have seen at its end; the schedule of the learning rate spans them."""
        left = self.train_iters - self.progress.iteration
        return self.progress.consumed_samples + max(0, left) * self.settings.global_batch_size

    @property
    def num_microbatches(self) -> int:
        """Micro-batches a replica runs in one step."""
        return self.sizes.num_microbatches(self.settings.global_batch_size, self.settings.micro_batch_size)

    @property
    def joins_rows(self) -> bool:
        """Whether a micro-batch runs as one long row whose segments the attention is told of."""
        apart = self.settings.packing or self.settings.reset_attention
        return apart and self.transformer_impl == "transformer_engine"

    @property
    def data_identity(self) -> dict[str, int | str | bool]:
        """What a position in the data means: a run resumes only where all of it is the same."""
        chosen = self.settings
        assert self.train is not None
        blend = {"blend": self.train.description} if isinstance(self.train, BlendedDataset) else {}
        return {
            "train_mode": chosen.train_mode,
            "samples_per_epoch": self.train.samples_per_epoch,
            "seq_length": chosen.seq_length,
            "seed": chosen.seed,
            "order": self.train.order,
            **blend,
            "content": self.data_hash,
        }


def plan_run(settings: TrainSettings, platform: Platform) -> Plan:
    """The plan of `settings` on `platform`; raises KitError for all that can be known to be wrong beforehand."""
    check_installed()
    overrides(settings.mcore)
    start = find_start(settings)
    qwen = load_config(start.model_folder)
    check_fit(settings, platform, qwen)
    if start.checkpoint:
        check_ranks(start.checkpoint, settings.sizes, qwen)
    train = valid = None
    progress = progress_of(start)
    if settings.train_or_convert_ckpt == "train":
        train, valid = open_data(settings, start.model_folder, qwen.vocab_size, not was_planned(), order_of(start))
    plan = Plan(
        settings=settings,
        platform=platform,
        sizes=settings.sizes,
        qwen=qwen,
        start=start,
        transformer_impl=settings.transformer_impl or platform.transformer_impl,
        ckpt_format=settings.ckpt_format or platform.checkpoint_format,
        train=train,
        valid=valid,
        train_iters=count_iterations(settings, train.samples_per_epoch, progress) if train else 0,
        progress=progress,
        data_hash=content_hash(settings.dataset_path) if settings.dataset_path and train else "",
    )
    if start.kind == "resume":
        check_resume(plan)
    if train:
        check_warmup(plan)
    # The last, since it takes longest; Megatron-Core has not touched the folder yet. One rank of a node looks: the
    # others wait for it in the process group, which all of them begin, before they read anything.
    if start.checkpoint and os.environ.get("LOCAL_RANK", "0") == "0":
        check_harmless(start.checkpoint)
    return plan


def progress_of(start: Start) -> Progress:
    """How far the run is that `start` resumes."""
    if start.kind != "resume" or start.checkpoint is None:
        return Progress()
    return Progress(**(description_of(start.checkpoint).get("progress") or {}))


def was_planned() -> bool:
    """Whether this process is a rank of a run that the process which started it has planned and checked."""
    return "TORCHELASTIC_RUN_ID" in os.environ and STARTED in os.environ


def order_of(start: Start) -> str | None:
    """The order of the samples of the run that `start` resumes; None for a new run.

    Before orders had names all were listed.
    """
    if start.kind != "resume" or start.checkpoint is None:
        return None
    return str((description_of(start.checkpoint).get("data") or {}).get("order", order_name(True)))


def check_warmup(plan: Plan) -> None:
    """Raises KitError unless the learning rate can rise and fall again within the run."""
    settings, batch = plan.settings, plan.settings.global_batch_size
    if settings.lr_warmup_iters and settings.lr_warmup_iters * batch >= plan.train_samples - batch:
        raise KitError(
            f"LR_WARMUP_ITERS={settings.lr_warmup_iters}: the run has {plan.train_iters} steps, of which the last has"
            " MIN_LR: make it smaller, or the run longer"
        )


def check_resume(plan: Plan) -> None:
    """Raises KitError unless the run can go on from where the checkpoint's was."""
    checkpoint = plan.start.checkpoint
    assert checkpoint
    run = description_of(checkpoint)
    if not run:
        raise KitError(
            f"{checkpoint.path} was not written by this kit's training, so there is no run to resume: set"
            " LOAD_CHECKPOINT_PATH to it for its weights alone, and SAVE_CHECKPOINT_PATH to a new folder"
        )
    if checkpoint.format == "torch_dist":
        same = all(run["layout"][name] == getattr(plan.sizes, name) for name in ("tp", "pp", "vpp"))
        check_optimizer_sharding(run["optimizer_sharding"], checkpoint.path, same_ranks=same)
    if run.get("optimizer") is False:
        raise KitError(
            f"{checkpoint.path} holds weights alone (SAVE_OPTIMIZER=false), so there is no run to resume: set"
            " LOAD_CHECKPOINT_PATH to it, and SAVE_CHECKPOINT_PATH to a new folder"
        )
    if plan.train:
        saved, now = run.get("data") or {}, plan.data_identity
        # Of a checkpoint that an older version of the kit wrote, what it did not note cannot be compared.
        both = [name for name in now if name in saved]
        different = [f"{name} {saved[name]} -> {now[name]}" for name in both if saved[name] != now[name]]
        if different:
            raise KitError(
                f"{checkpoint.path} was trained on other samples ({', '.join(different)}), so its position in the data"
                " has no meaning here: use the same settings and data, or start a new SAVE_CHECKPOINT_PATH with"
                " LOAD_CHECKPOINT_PATH set to this one"
            )
    if checkpoint.format == "torch" and run["layout"]["dp"] != plan.sizes.dp:
        raise KitError(
            f"{checkpoint.path} is in torch format with the optimizer of {run['layout']['dp']} data-parallel replicas,"
            f" this run has {plan.sizes.dp}: use as many GPUs as before, or CKPT_FORMAT=torch_dist from the start"
        )


def find_start(settings: TrainSettings) -> Start:
    """Where the run starts, by IS_INITIAL_RUN and by what lies in the two checkpoint folders."""
    if settings.train_or_convert_ckpt == "convert":
        return _start_of_conversion(settings)
    saved = _whole_iteration(Path(settings.save_checkpoint_path))
    if saved and settings.is_initial_run == "true":
        raise KitError(
            f"IS_INITIAL_RUN=true, but {saved.folder} holds iteration {saved.iteration}:"
            " set IS_INITIAL_RUN=auto to resume it, or another SAVE_CHECKPOINT_PATH"
        )
    if saved:
        return Start("resume", saved.folder, saved)
    if settings.is_initial_run == "false":
        raise KitError(f"IS_INITIAL_RUN=false, but {settings.save_checkpoint_path} holds no iteration to resume from")
    if settings.load_checkpoint_path:
        loaded = _need_checkpoint(settings.load_checkpoint_path)
        return Start("weights", loaded.folder, loaded)
    if settings.hf_model_path:
        return Start("random", Path(settings.hf_model_path), None)
    raise KitError(
        "no weights to start from: set LOAD_CHECKPOINT_PATH to what step 2 wrote,"
        " or HF_MODEL_PATH to train a model from scratch"
    )


def _start_of_conversion(settings: TrainSettings) -> Start:
    assert settings.load_checkpoint_path
    if Path(settings.load_checkpoint_path).resolve() == Path(settings.save_checkpoint_path).resolve():
        raise KitError(
            f"SAVE_CHECKPOINT_PATH={settings.save_checkpoint_path} is the folder that is read: choose another folder"
        )
    loaded = _need_checkpoint(settings.load_checkpoint_path)
    if loaded.format != "torch_dist":
        raise KitError(f"{loaded.path} is in {loaded.format} format already: step 2 reads it as it is")
    return Start("resume" if isinstance(loaded.iteration, int) else "weights", loaded.folder, loaded)


def _whole_iteration(folder: Path) -> Checkpoint | None:
    found = find_checkpoint(folder) if folder.is_dir() else None
    if found and found.path == folder.absolute():
        raise KitError(f"SAVE_CHECKPOINT_PATH={folder} is one checkpoint: give the folder it lies in, {found.folder}")
    return found if found and isinstance(found.iteration, int) else None


def _need_checkpoint(path: str) -> Checkpoint:
    if not Path(path).is_dir():
        raise KitError(f"LOAD_CHECKPOINT_PATH={path} is no folder: give what step 2 wrote, or a run's checkpoints")
    found = find_checkpoint(Path(path))
    if found is None:
        raise KitError(
            f"LOAD_CHECKPOINT_PATH={path} holds no checkpoint: give what step 2 wrote, or a run's checkpoints"
        )
    return found


def count_iterations(settings: TrainSettings, samples_per_epoch: int, progress: Progress) -> int:
    """TRAIN_ITERS, or the steps done and those that the rest of EPOCHS passes over the data take, rounded up.

    What is left counts in samples: the steps done may have been of another GLOBAL_BATCH_SIZE.
    """
    if settings.train_iters is not None:
        return settings.train_iters
    assert settings.epochs is not None
    epochs = Fraction(str(settings.epochs))  # as it is written: 100 x 1.1 in floats is over 110
    left = samples_per_epoch * epochs - progress.consumed_samples
    return progress.iteration + max(0, math.ceil(left / settings.global_batch_size))


def describe(plan: Plan) -> None:
    """Logs what the run will do, a line a subject."""
    sizes, chosen, start, done = plan.sizes, plan.settings, plan.start, plan.progress
    logger.info(
        "%s: %d processes = TP %d x PP %d x CP %d x DP %d, %s layers, %s",
        plan.platform.name, sizes.world_size, sizes.tp, sizes.pp, sizes.cp, sizes.dp, plan.transformer_impl,
        chosen.precision,
    )  # fmt: skip
    if not plan.platform.ran_on_hardware:
        logger.info("note: this kit was not run on %s hardware", plan.platform.name)
    if plan.ckpt_format in plan.platform.unproven_formats:
        logger.warning(
            "CKPT_FORMAT=%s was not run on %s hardware: keep the weights that it began with; the default there is %s",
            plan.ckpt_format, plan.platform.name, plan.platform.checkpoint_format,
        )  # fmt: skip
    for line in describe_overrides(chosen.mcore):
        logger.info(line)
    source = start.checkpoint.path if start.checkpoint else start.model_folder
    logger.info("start: %s from %s", start.kind, source)
    if plan.train:
        logger.info(
            "data: %d samples of %d tokens an epoch; %d steps of %d samples = %.2f epochs; validation: %s",
            plan.train.samples_per_epoch, chosen.seq_length,
            plan.train_iters - done.iteration, chosen.global_batch_size,
            (plan.train_samples - done.consumed_samples) / plan.train.samples_per_epoch,
            f"{plan.valid.samples_per_epoch} samples" if plan.valid else "none",
        )  # fmt: skip
