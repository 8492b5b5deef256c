"""Logging, evaluation, profiles, TensorBoard, Weights & Biases and SwanLab."""

import re
from dataclasses import dataclass

from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Logging and evaluation."""

    log_interval: int = option(10, "steps between log lines")
    eval_interval: int = option(100, "steps between evaluations; 0: none")
    eval_iters: int = option(50, "global batches per evaluation; validation sets with names are evaluated whole")
    max_first_loss: float | None = option(None, "stop if the first loss is higher, a sign of wrong weights")
    profile: str | None = option(None, "steps to write a trace of with torch.profiler, as 10-12")
    profile_ranks: str = option("0", "ranks whose steps are traced, as 0,8, or all")
    memory_snapshot: bool = option(
        False, "write what holds the GPU's memory after PROFILE's steps, or the first 3, and when it runs out"
    )
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

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The first and the last step of PROFILE; raises KitError if it names none."""
        if self.profile is None:
            return None
        found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", self.profile)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        require(self, "profile", first <= last, "give a step or a range of them, counted from 1, as 10-12")
        return first, last

    def profiles_rank(self, rank: int) -> bool:
        """Whether PROFILE_RANKS has `rank`."""
        return self.profile_ranks == "all" or str(rank) in self.profile_ranks.split(",")

    def check_log(self, world_size: int) -> None:
        """Raises KitError for values out of range."""
        assert self.profile_steps or self.profile is None
        known = {"all", *map(str, range(world_size))}
        named = {self.profile_ranks} if self.profile_ranks == "all" else {*self.profile_ranks.split(",")}
        require(self, "profile_ranks", named <= known, f"give ranks from 0 to {world_size - 1}, as 0,1, or all")
        require(self, "log_interval", self.log_interval >= 1, "it must be at least 1")
        for name in ("eval_interval", "eval_iters"):
            require(self, name, getattr(self, name) >= 0, "it must not be negative")
