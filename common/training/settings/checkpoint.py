"""What a run starts from, what it saves, and which checkpoints stay."""

from dataclasses import dataclass

from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints."""

    save_checkpoint_path: str = option(help="where checkpoints go, and where a run resumes from")
    load_checkpoint_path: str | None = option(None, "weights to start from: what step 2 wrote, or another run")
    hf_model_path: str | None = option(None, "only to train from scratch: folder with config.json and tokenizer")
    is_initial_run: str = option("auto", "auto: resume if there is what to resume", ("auto", "true", "false"))
    train_or_convert_ckpt: str = option(
        "train", "train, or turn the newest distributed checkpoint into torch format", ("train", "convert")
    )
    save_interval: int = option(100, "steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = option(3, "newest checkpoints to keep; 0: all")
    keep_every: int = option(0, "also keep each checkpoint whose iteration is a multiple of it; 0: none")
    keep_best: int = option(0, "also keep this many of the lowest validation loss; 0: none")
    keep_epochs: bool = option(False, "save at the end of each epoch, and keep that checkpoint too")
    save_optimizer: bool = option(True, "false: checkpoints hold weights alone, from which no run can be resumed")
    async_save: bool = option(False, "torch_dist only: write checkpoints while training goes on")
    ckpt_format: str | None = option(None, "torch_dist or torch; default: the platform's", ("torch_dist", "torch"))

    def check_checkpoints(self) -> None:
        """Raises KitError for values out of range."""
        require(self, "save_interval", self.save_interval >= 1, "it must be at least 1")
        for name in ("keep_checkpoints", "keep_every", "keep_best"):
            require(self, name, getattr(self, name) >= 0, "it must not be negative")
