"""The plan of a run: derived from its settings and checked in one process before any other starts."""

import math
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from common.checkpoint.formats.checkpoint_paths import Checkpoint, find_checkpoint
from common.checkpoint.formats.common_state import check_parallel_sizes, common_state, run_metadata
from common.checkpoint.verification.pickle_scan import check_pickles
from common.data.dataset.blended_dataset import BlendedDataset
from common.data.dataset.sample_dataset import SampleDataset
from common.data.dataset.shuffle import order_name
from common.engine.dist_checkpointing import check_optimizer_sharding
from common.engine.installation import check_installed
from common.engine.overrides import overrides
from common.errors import KitError
from common.model.shape.config import QwenConfig, load_config
from common.parallel import ParallelSizes, is_node_leader
from common.platforms.base import Platform
from common.training.planning.adapters import AdapterPlan, plan_adapters
from common.training.planning.compatibility import check_fit, with_packing
from common.training.planning.datasets import content_hash, open_data, validation_hashes
from common.training.planning.deadline import STARTED
from common.training.planning.frozen import Frozen, check_frozen, frozen_weights
from common.training.planning.reference import check_references, reference_hash
from common.training.planning.schedule import WSD, check_resumed_decay, check_schedule
from common.training.settings import TrainSettings


@dataclass(frozen=True)
class Progress:
    """Steps and samples that a run has completed, and the last loss that was logged, if any."""

    iteration: int = 0
    consumed_samples: int = 0
    loss: float | None = None


@dataclass(frozen=True)
class Start:
    """The source of a run's weights, and the folder whose config.json and tokenizer go into its checkpoints.

    kind: "resume" (weights, optimizer, schedule, random state, position), "weights" (iteration 0) or "random".
    """

    kind: str
    model_folder: Path
    checkpoint: Checkpoint | None

    @property
    def in_torch_format(self) -> bool:
        """Whether its checkpoint loads only at the TP, PP, VPP and PIPELINE_LAYERS that it was written with."""
        return self.checkpoint is not None and self.checkpoint.format == "torch"


@dataclass(frozen=True)
class Plan:
    """A run's settings and everything derived from them.

    valid: of sets that have names, NamedDatasets. valid_hashes: of their contents, by name ("" without one); empty
    where the run does not evaluate.
    """

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
    valid_hashes: dict[str, str] = field(default_factory=dict)
    adapters: AdapterPlan | None = None  # with TUNER=lora
    frozen: Frozen = frozenset()  # weights without gradients, by TRAINABLE and FREEZE
    reference: str = ""  # the weights that preferences are compared with, see reference_hash

    @property
    def train_samples(self) -> int:
        """Samples consumed by the end of the run; the learning rate schedule spans them."""
        left = self.train_iters - self.progress.iteration
        return self.progress.consumed_samples + max(0, left) * self.settings.global_batch_size

    @property
    def in_torch_format(self) -> bool:
        """Whether a checkpoint that it loads is in torch format: that of its start, or that its adapters add to."""
        return self.start.in_torch_format or (self.adapters is not None and self.adapters.base.format == "torch")

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per replica in one step."""
        return self.sizes.num_microbatches(self.settings.global_batch_size, self.settings.micro_batch_size)

    @property
    def separate_documents(self) -> bool:
        """Whether rows hold several documents, each attending to itself."""
        return bool(self.settings.packing or self.settings.reset_attention)

    @property
    def packed_sequences(self) -> bool:
        """Whether a micro-batch is one long row with sequence boundaries (Transformer Engine's `thd` layout).

        Not with context parallelism, where each document would have to be padded to a multiple of 2 * CP: rows would
        depend on the layout. The kit's own attention takes such rows.
        """
        return self.separate_documents and self.transformer_impl == "transformer_engine" and self.sizes.cp == 1

    @property
    def data_identity(self) -> dict[str, int | str | bool]:
        """What defines a position in the data: a run resumes only if all of it is unchanged."""
        settings = self.settings
        assert self.train is not None
        blend = {"blend": self.train.description} if isinstance(self.train, BlendedDataset) else {}
        return {
            "train_mode": settings.train_mode,
            "samples_per_epoch": self.train.samples_per_epoch,
            "seq_length": settings.seq_length,
            "seed": settings.seed,
            "order": self.train.order,
            **blend,
            **({"reference": self.reference} if self.reference else {}),
            "content": self.data_hash,
        }


def plan_run(settings: TrainSettings, platform: Platform) -> Plan:
    """The plan of `settings` on `platform`; raises KitError for every mistake that can be found before training."""
    check_installed()
    overrides(settings.mcore)
    start = find_start(settings)
    qwen = load_config(start.model_folder)
    settings = with_packing(settings, platform)
    check_fit(settings, platform, qwen)
    adapters = plan_adapters(settings, start.kind, start.checkpoint)
    if start.checkpoint:
        check_parallel_sizes(start.checkpoint, settings.sizes, qwen)
    if adapters:
        check_parallel_sizes(adapters.base, settings.sizes, qwen)
    train = valid = None
    progress = progress_of(start)
    if settings.train_or_convert_ckpt == "train":
        train, valid = open_data(
            settings, start.model_folder, qwen.vocab_size, not planned_by_launcher(), order_of(start)
        )
    data_hash = content_hash(settings.dataset_path) if settings.dataset_path and train else ""
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
        data_hash=data_hash,
        valid_hashes=validation_hashes(settings, data_hash) if valid and settings.eval_interval else {},
        adapters=adapters,
        frozen=frozen_weights(settings, qwen),
        reference=reference_hash(settings, start.kind, start.checkpoint),
    )
    if start.kind == "resume":
        check_resume(plan)
    if train:
        check_schedule(settings, plan.train_iters, plan.train_samples)
        check_references(settings, plan.reference, [train, valid], start.checkpoint)
    # Last, because it takes longest; Megatron-Core has not opened the folder yet. One rank of each node checks: the
    # others wait for it when the process group is initialized, before they read anything.
    if is_node_leader():
        for checkpoint in dict.fromkeys((start.checkpoint, adapters.base if adapters else None)):
            if checkpoint:
                check_pickles(checkpoint)
    return plan


def progress_of(start: Start) -> Progress:
    """The progress of the run that `start` resumes; zero for a new run."""
    if start.kind != "resume" or start.checkpoint is None:
        return Progress()
    return Progress(**(run_metadata(start.checkpoint).get("progress") or {}))


def planned_by_launcher() -> bool:
    """Whether this process is a rank whose launcher has already planned and checked the run."""
    return "TORCHELASTIC_RUN_ID" in os.environ and STARTED in os.environ


def order_of(start: Start) -> str | None:
    """The sample order of the run that `start` resumes; None for a new run.

    Checkpoints without a named order used the listed one.
    """
    if start.kind != "resume" or start.checkpoint is None:
        return None
    return str((run_metadata(start.checkpoint).get("data") or {}).get("order", order_name(True)))


def check_resume(plan: Plan) -> None:
    """Raises KitError unless the run can resume from its checkpoint."""
    checkpoint = plan.start.checkpoint
    assert checkpoint
    run = run_metadata(checkpoint)
    if not run:
        raise KitError(
            f"{checkpoint.path} was not written by this kit's training, so it cannot be resumed: set"
            " LOAD_CHECKPOINT_PATH to it to start from its weights, and SAVE_CHECKPOINT_PATH to a new folder"
        )
    if checkpoint.format == "torch_dist":
        same = all(run["layout"][name] == getattr(plan.sizes, name) for name in ("tp", "pp", "vpp"))
        check_optimizer_sharding(run["optimizer_sharding"], checkpoint.path, same_ranks=same)
    check_frozen(run, plan.frozen, checkpoint.path)
    if run.get("optimizer") is False:
        raise KitError(
            f"{checkpoint.path} holds weights only (SAVE_OPTIMIZER=false), so it cannot be resumed: set"
            " LOAD_CHECKPOINT_PATH to it, and SAVE_CHECKPOINT_PATH to a new folder"
        )
    if plan.train:
        if plan.settings.lr_decay_style == WSD:
            schedule = common_state(checkpoint).get("opt_param_scheduler") or {}
            check_resumed_decay(plan.settings, plan.train_samples, plan.progress.consumed_samples, schedule)
        saved, now = run.get("data") or {}, plan.data_identity
        # Checkpoints of older versions of the kit do not record every field; only recorded ones can be compared.
        both = [name for name in now if name in saved]
        different = [f"{name} {saved[name]} -> {now[name]}" for name in both if saved[name] != now[name]]
        if different:
            raise KitError(
                f"{checkpoint.path} was trained on other samples ({', '.join(different)}), so its position in the data"
                " does not apply: use the same settings (also PACKING) and data, or a new SAVE_CHECKPOINT_PATH with"
                " LOAD_CHECKPOINT_PATH set to this one"
            )
    replicas = run["layout"]["dp"] * run["layout"]["cp"]
    if checkpoint.format == "torch" and replicas != plan.sizes.replicas:
        raise KitError(
            f"{checkpoint.path} is in torch format with the optimizer of {replicas} data-parallel replicas, this run"
            f" has {plan.sizes.replicas} (DP x CP): use as many GPUs as before, or CKPT_FORMAT=torch_dist from the"
            " start"
        )


def find_start(settings: TrainSettings) -> Start:
    """Where the run starts, from IS_INITIAL_RUN and the contents of the two checkpoint folders."""
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
        raise KitError(f"{loaded.path} is already in {loaded.format} format: step 2 reads it directly")
    return Start("resume" if isinstance(loaded.iteration, int) else "weights", loaded.folder, loaded)


def _whole_iteration(folder: Path) -> Checkpoint | None:
    found = find_checkpoint(folder) if folder.is_dir() else None
    if found and found.path == folder.absolute():
        raise KitError(
            f"SAVE_CHECKPOINT_PATH={folder} is a single checkpoint: set it to its parent folder, {found.folder}"
        )
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
    """TRAIN_ITERS, or the completed steps plus those that the rest of EPOCHS takes, rounded up.

    The rest is counted in samples: GLOBAL_BATCH_SIZE may have changed since the completed steps.
    """
    if settings.train_iters is not None:
        return settings.train_iters
    assert settings.epochs is not None
    epochs = Fraction(str(settings.epochs))  # from its decimal text: in floats, 100 * 1.1 > 110
    left = samples_per_epoch * epochs - progress.consumed_samples
    return progress.iteration + max(0, math.ceil(left / settings.global_batch_size))
