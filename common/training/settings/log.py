"""Logging, evaluation, TensorBoard, Weights & Biases and SwanLab."""

from dataclasses import dataclass

from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Logging and evaluation."""

    log_interval: int = option(10, "steps between log lines")
    eval_interval: int = option(100, "steps between evaluations; 0: none")
    eval_iters: int = option(50, "global batches per evaluation; validation sets with names are evaluated whole")
    max_first_loss: float | None = option(None, "stop if the first loss is higher, a sign of wrong weights")
    tensorboard: str = option(
        "auto",
        "event files in SAVE_CHECKPOINT_PATH/tensorboard; auto: if tensorboardX is installed",
        ("auto", "true", "false"),
    )
    wandb_project: str | None = option(None, "log to Weights & Biases under this project")
    wandb_exp_name: str | None = option(None, "name of the Weights & Biases run")
    wandb_mode: str = option("online", "Weights & Biases mode", ("online", "offline", "disabled"))
    wandb_save_path: str | None = option(None, "folder for the files of Weights & Biases")
    swanlab_project: str | None = option(None, "log to SwanLab under this project")
    swanlab_exp_name: str | None = option(None, "name of the SwanLab run")
    swanlab_mode: str = option("online", "SwanLab mode", ("online", "local", "offline", "disabled"))
    swanlab_save_path: str | None = option(None, "folder for the files of SwanLab")

    def check_log(self) -> None:
        """Raises KitError for values out of range."""
        require(self, "log_interval", self.log_interval >= 1, "it must be at least 1")
        for name in ("eval_interval", "eval_iters"):
            require(self, name, getattr(self, name) >= 0, "it must not be negative")
