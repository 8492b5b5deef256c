"""What a run reads, and how it becomes samples."""

from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data."""

    train_mode: str = option(
        "pretrain", "pretrain: every token is learned; finetune: the answers", ("pretrain", "finetune")
    )
    dataset_path: str | None = option(None, "what step 1 wrote (its OUTPUT_PREFIX), or several by weight: 0.7 a 0.3 b")
    valid_dataset_path: str | None = option(None, "a separate validation set; SPLIT is not used then")
    split: str = option("98,2,0", "shares of the documents for training, validation and nothing")
    seq_length: int = option(2048, "tokens in a sample")
    packing: bool = option(False, "finetune: several samples a row, without attention between them")
    truncate: str = option("error", "finetune samples over SEQ_LENGTH", ("error", "drop", "left", "right"))
    reset_attention: bool = option(False, "pretrain: no attention between the documents of a sample")
    num_workers: int = option(2, "processes that read batches ahead; 0: none")
    seed: int = option(1234, "of random weights and of the order of samples")

    def check_data(self) -> None:
        """Raises KitError for values that contradict each other."""
        require(self, "seq_length", self.seq_length >= 1, "it must be at least 1")
        require(self, "num_workers", self.num_workers >= 0, "it must not be negative")
        if self.packing and self.train_mode == "pretrain":
            raise KitError("PACKING=true is for TRAIN_MODE=finetune; pretraining samples are always full")
        if self.reset_attention and self.train_mode == "finetune":
            raise KitError("RESET_ATTENTION=true is for TRAIN_MODE=pretrain; packed samples never attend to each other")
