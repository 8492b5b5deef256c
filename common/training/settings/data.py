"""The datasets of a run, and how samples are made from them."""

from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data."""

    train_mode: str = option(
        "pretrain", "pretrain: loss on every token; finetune: on the answers; dpo: chosen over rejected answers",
        ("pretrain", "finetune", "dpo"),
    )  # fmt: skip
    dataset_path: str | None = option(None, "OUTPUT_PREFIX of step 1, or a weighted blend: 0.7 a 0.3 b")
    valid_dataset_path: str | None = option(
        None, "used instead of SPLIT: a validation set, or several by name: law a general b"
    )
    split: str = option("98,2,0", "shares of the documents: training, validation, unused")
    seq_length: int = option(2048, "tokens in a sample")
    packing: bool | None = option(
        None, "finetune, dpo: several samples or pairs per row, each attending to itself; auto: if the layers can"
    )
    truncate: str = option(
        "error", "what to do with samples or pairs longer than SEQ_LENGTH", ("error", "drop", "left", "right")
    )
    reset_attention: bool = option(False, "pretrain: no attention between the documents of a sample")
    num_workers: int = option(
        2, "data loader processes of each rank that reads, the first of a TP group; 0: read in the rank itself"
    )
    seed: int = option(1234, "random seed of initial weights and of the sample order")

    def check_data(self) -> None:
        """Raises KitError for values out of range or in conflict."""
        require(self, "seq_length", self.seq_length >= 1, "it must be at least 1")
        require(self, "num_workers", self.num_workers >= 0, "it must not be negative")
        if self.packing and self.train_mode == "pretrain":
            raise KitError("PACKING=true is for TRAIN_MODE=finetune and dpo; pretraining samples are always full")
        if self.reset_attention and self.train_mode != "pretrain":
            raise KitError("RESET_ATTENTION=true is for TRAIN_MODE=pretrain; packed samples never attend to each other")
