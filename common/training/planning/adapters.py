"""The adapters of a run with TUNER=lora, and the checkpoint of the weights that they add to."""

from dataclasses import dataclass
from pathlib import Path

from common.checkpoint.formats.adapter_checkpoint import AdapterOf, adapter_of, check_base, check_whole
from common.checkpoint.formats.checkpoint_paths import Checkpoint, find_checkpoint
from common.checkpoint.formats.identity import weights_hash
from common.checkpoint.formats.peft_folder import read_peft_config
from common.errors import KitError
from common.model.shape.lora import MODULES, LoraConfig
from common.training.settings import TrainSettings


@dataclass(frozen=True)
class AdapterPlan:
    """The adapters that a run trains on the frozen weights of `base`; peft: the folder that they start from, if any."""

    lora: LoraConfig
    base: Checkpoint
    base_hash: str
    peft: Path | None = None

    @property
    def description(self) -> str:
        """One line for the log."""
        lora = self.lora
        targets = "all linear layers" if lora.targets == MODULES else ", ".join(lora.targets)
        start = f", from {self.peft}" if self.peft else ""
        return f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {targets}{start}; {self.base.path} stays as it is"

    @property
    def saved(self) -> AdapterOf:
        """What the run's checkpoints record of it."""
        return AdapterOf(self.lora, str(self.base.path), self.base_hash)


def plan_adapters(settings: TrainSettings, kind: str, checkpoint: Checkpoint | None) -> AdapterPlan | None:
    """The adapters of a run that starts from `checkpoint`; None with TUNER=full.

    kind: of the start, see Start. Raises KitError where settings and checkpoint contradict each other.
    """
    if settings.train_or_convert_ckpt == "convert":
        if checkpoint:
            check_whole(checkpoint, "step 2 exports it as it is")
        return None
    if settings.tuner == "full":
        if checkpoint and kind == "resume":
            check_whole(checkpoint, "set TUNER=lora to resume the run, or another SAVE_CHECKPOINT_PATH")
        elif checkpoint:
            check_whole(checkpoint, "export it with EXPORT=merged in step 2, and convert that to start from it")
        return None
    if checkpoint is None:
        raise KitError("TUNER=lora adds to trained weights: set LOAD_CHECKPOINT_PATH to what step 2 wrote")
    if kind == "resume":
        return _resumed(settings, checkpoint)
    check_whole(checkpoint, "set LOAD_CHECKPOINT_PATH to that, and LORA_ADAPTER to the adapter, exported by step 2")
    peft = Path(settings.lora_adapter) if settings.lora_adapter else None
    lora = settings.lora_config(read_peft_config(peft) if peft else None)
    return AdapterPlan(lora, checkpoint, weights_hash(checkpoint.path), peft)


def _resumed(settings: TrainSettings, checkpoint: Checkpoint) -> AdapterPlan:
    found = adapter_of(checkpoint)
    if found is None:
        raise KitError(
            f"TUNER=lora, but {checkpoint.path} holds a run that trains all weights: set TUNER=full to resume it, or"
            " another SAVE_CHECKPOINT_PATH"
        )
    path = Path(settings.load_checkpoint_path or found.base)
    base = find_checkpoint(path) if path.is_dir() else None
    if base is None:
        raise KitError(
            f"{path} holds no checkpoint, and the adapters of {checkpoint.path} add to its weights: set"
            " LOAD_CHECKPOINT_PATH to where they are now"
        )
    check_whole(base, "set LOAD_CHECKPOINT_PATH to the weights that the run started from")
    check_base(found, base, checkpoint, "LOAD_CHECKPOINT_PATH")
    return AdapterPlan(settings.lora_config(found.lora), base, found.base_hash)
