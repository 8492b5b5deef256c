"""The settings of step 5."""

from dataclasses import dataclass

from common.data.dataset.sft_dataset import TRUNCATE
from common.data.encoders.pretrain import SPECIAL_TOKENS
from common.data.templates.row_formats import FORMATS, TEXT_FORMAT
from common.errors import KitError
from common.inference.model import ModelSettings
from common.settings import option, require


@dataclass(frozen=True)
class RowSettings:
    """Held-out rows: the loss per supervised token."""

    input: str | None = option(
        None, "files of rows as in step 1, each reported by itself; NAME=FILE reports it as NAME"
    )
    format: str = option(
        "auto", "format of a row; auto: by the first row of each file", ("auto", TEXT_FORMAT, *FORMATS)
    )
    json_key: str = option("text", "texts: the field that holds the text")
    special_tokens: str = option("text", "texts: special tokens in them: text, error or parse", SPECIAL_TOKENS)
    roles: str = option("system", "instruction is the system turn, or alpaca: the user turn", ("system", "alpaca"))
    loss_on: str = option("answer", "answer: its text and end token; turn: its header too", ("answer", "turn"))
    loss_turns: str = option("all", "which answers count", ("all", "last"))
    append_eod: bool | None = option(None, "end each row with EOD_TOKEN; default: texts true, conversations false")
    eod_token: str = option("auto", "auto: <|endoftext|>, or the tokenizer's eos token; else the token itself")
    seq_length: int | None = option(None, "most tokens in one forward pass; default: the model's positions")
    stride: int | None = option(None, "texts over SEQ_LENGTH: tokens from one window to the next; default: SEQ_LENGTH")
    truncate: str = option("error", "conversations over SEQ_LENGTH: error, drop, left or right", TRUNCATE)
    batch_size: int = option(8, "windows or rows in one forward pass")


@dataclass(frozen=True)
class TaskSettings:
    """Tasks of lm-evaluation-harness."""

    tasks: str | None = option(None, "names of tasks, separated by commas; needs requirements/eval.txt")
    tasks_path: str | None = option(None, "folder with task files (.yaml) of your own")
    num_fewshot: int | None = option(None, "examples in a prompt; default: the task's")
    apply_chat_template: bool = option(False, "ask in the model's chat template")


@dataclass(frozen=True)
class EvaluateSettings(RowSettings, TaskSettings, ModelSettings):
    """Loss and perplexity of an exported model on held-out rows, and its score in choice tasks."""

    output: str | None = option(None, "new JSON file for the results; default: only the table")

    def __post_init__(self) -> None:
        if not self.input and not self.tasks:
            raise KitError("there is nothing to evaluate: set INPUT to held-out rows, TASKS to tasks, or both")
        require(self, "batch_size", self.batch_size >= 1, "it must be at least 1")
        require(self, "seq_length", self.seq_length is None or self.seq_length >= 1, "it must be at least 1")
        require(self, "stride", self.stride is None or self.stride >= 1, "it must be at least 1")
        require(self, "num_fewshot", self.num_fewshot is None or self.num_fewshot >= 0, "it must be at least 0")
        if not self.tasks and (self.tasks_path or self.num_fewshot is not None or self.apply_chat_template):
            raise KitError("TASKS_PATH, NUM_FEWSHOT and APPLY_CHAT_TEMPLATE have no effect without TASKS: set TASKS")
