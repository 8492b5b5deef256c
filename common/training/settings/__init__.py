"""TrainSettings: every setting of step 3, composed of one dataclass per group; the command line follows from it."""

from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require
from common.training.settings.batch import BatchSettings
from common.training.settings.checkpoint import CheckpointSettings
from common.training.settings.data import DataSettings
from common.training.settings.kernels import KernelSettings
from common.training.settings.launch import LaunchSettings
from common.training.settings.log import LogSettings
from common.training.settings.lora import LoraSettings
from common.training.settings.mode_defaults import defaults_of
from common.training.settings.optimizer import OptimizerSettings
from common.training.settings.parallel import ParallelSettings
from common.training.settings.preference import PreferenceSettings


@dataclass(frozen=True, kw_only=True)
class TrainSettings(
    LaunchSettings,
    LogSettings,
    KernelSettings,
    CheckpointSettings,
    LoraSettings,
    OptimizerSettings,
    BatchSettings,
    ParallelSettings,
    PreferenceSettings,
    DataSettings,
):  # dataclass fields start with those of the last base
    """Megatron-Core's own fields."""

    mcore: tuple[str, ...] = option(
        (),
        "SECTION.FIELD=VALUE, repeatable, also written --mcore.SECTION.FIELD VALUE ...: sets a field of Megatron-Core's"
        " transformer, ddp or optimizer config",
    )

    def __post_init__(self) -> None:
        for name, value in defaults_of(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the class is frozen
        self.check_data()
        self.check_preference(self.train_mode, self.cp)
        self.check_batch(training=self.train_or_convert_ckpt == "train")
        self.check_optimizer()
        self.check_lora()
        self.check_parallel()
        self.check_launch(self.nnodes)
        self.check_checkpoints()
        self.check_log(self.sizes.world_size)
        self.check_kernels(self.optimizer_state)
        self._check_start()
        self._check_restarts()
        self._check_division()

    @property
    def rows_per_sample(self) -> int:
        """Rows of SEQ_LENGTH positions that a sample has: two of a pair that is not packed, an answer in each."""
        return 2 if self.train_mode == "dpo" and not self.packing else 1

    def _check_start(self) -> None:
        """Raises KitError where the input of a run or a conversion is not set."""
        if self.train_or_convert_ckpt == "train":
            require(self, "dataset_path", bool(self.dataset_path), "training needs what step 1 wrote: set DATASET_PATH")
        elif not self.load_checkpoint_path:
            raise KitError("LOAD_CHECKPOINT_PATH is not set: convert reads the distributed checkpoint there")
        if self.export_hf == "best" and not self.eval_interval:
            raise KitError("EXPORT_HF=best needs the validation loss, and EVAL_INTERVAL=0: change one of them")
        if self.keep_best and not self.eval_interval:
            raise KitError(
                f"KEEP_BEST={self.keep_best} needs the validation loss, and EVAL_INTERVAL=0: change one of them"
            )

    def _check_restarts(self) -> None:
        """Raises KitError where a restart could not resume."""
        if self.max_restarts and self.is_initial_run == "true":
            raise KitError(
                f"IS_INITIAL_RUN=true with MAX_RESTARTS={self.max_restarts}: a restart resumes, which true does not"
                " allow: set IS_INITIAL_RUN=auto"
            )
        if not self.save_optimizer and self.max_restarts:
            raise KitError(
                f"SAVE_OPTIMIZER=false with MAX_RESTARTS={self.max_restarts}: a restart cannot resume from weights"
                " only: change one of them"
            )

    def _check_division(self) -> None:
        """Raises KitError where batches or sequences cannot be divided over the GPUs."""
        sizes = self.sizes
        if self.sequence_parallel and self.seq_length % self.tp:
            raise KitError(
                f"SEQ_LENGTH={self.seq_length} cannot be divided by TP={self.tp}, which sequence parallelism needs:"
                f" use a multiple of {self.tp}"
            )
        num_microbatches = sizes.num_microbatches(self.global_batch_size, self.micro_batch_size)
        if self.vpp > 1 and num_microbatches % self.pp:
            raise KitError(
                f"VPP={self.vpp} needs a number of micro-batches divisible by PP={self.pp}, and GLOBAL_BATCH_SIZE="
                f"{self.global_batch_size} gives {num_microbatches}: change GLOBAL_BATCH_SIZE or MICRO_BATCH_SIZE"
            )
