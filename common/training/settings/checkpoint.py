"""Where a run starts, what it saves, and which checkpoints it keeps."""

from dataclasses import dataclass

from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints."""

    save_checkpoint_path: str = option(help="folder of the run's checkpoints; a run resumes from it")
    load_checkpoint_path: str | None = option(None, "weights to start from: output of step 2, or of another run")
    hf_model_path: str | None = option(
        None, "to train from scratch: folder with config.json and tokenizer", hub="tokenizer"
    )
    is_initial_run: str = option("auto", "auto: resume if a checkpoint exists", ("auto", "true", "false"))
    train_or_convert_ckpt: str = option(
        "train", "train, or convert the newest torch_dist checkpoint to torch format", ("train", "convert")
    )
    save_interval: int = option(100, "steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = option(3, "number of latest checkpoints to keep; 0: all")
    keep_every: int = option(0, "also keep checkpoints at multiples of this many steps; 0: none")
    keep_best: int = option(0, "also keep this many checkpoints with the lowest validation loss; 0: none")
    keep_epochs: bool = option(False, "also save and keep a checkpoint at the end of each epoch")
    save_optimizer: bool = option(True, "false: save weights only, which cannot be resumed")
    async_save: bool = option(False, "torch_dist only: write checkpoints in the background")
    export_hf: str = option(
        "none", "export checkpoints for transformers beside training: none, best, last or each",
        ("none", "best", "last", "each"),
    )  # fmt: skip
    ckpt_format: str | None = option(None, "torch_dist or torch; default: the platform's", ("torch_dist", "torch"))

    def check_checkpoints(self) -> None:
        """Raises KitError for values out of range."""
        require(self, "save_interval", self.save_interval >= 1, "it must be at least 1")
        for name in ("keep_checkpoints", "keep_every", "keep_best"):
            require(self, name, getattr(self, name) >= 0, "it must not be negative")
