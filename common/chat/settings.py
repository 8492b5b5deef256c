"""The settings of step 4."""

from dataclasses import dataclass

from common.errors import KitError
from common.inference.model import ModelSettings
from common.inference.prompt_rows import PLAIN
from common.inference.sampling import SamplingSettings
from common.settings import option, require

MODES = ("auto", "chat", "complete")


@dataclass(frozen=True)
class PromptSettings:
    """Prompts."""

    mode: str = option("auto", "chat; complete: texts; auto: chat, and rows with `text` are completed", MODES)
    system: str | None = option(None, "the system turn of conversations without their own; default: the template's")
    prompts: str | None = option(None, f"file of prompts: rows as in step 1, or {PLAIN}, one a line; default: you type")
    output: str | None = option(None, "with PROMPTS: new file for the answers, in jsonl; default: stdout")
    roles: str = option("system", "as in step 1: instruction is the system turn, or the user's", ("system", "alpaca"))
    batch_size: int = option(8, "with PROMPTS: prompts that are answered at once")
    chat_template_kwargs: str | None = option(None, 'variables of the template, in JSON: {"enable_thinking": false}')


@dataclass(frozen=True)
class ChatSettings(PromptSettings, SamplingSettings, ModelSettings):
    """Talks to an exported model, or continues its texts."""

    def __post_init__(self) -> None:
        require(self, "batch_size", self.batch_size >= 1, "it must be at least 1")
        if self.output and not self.prompts:
            raise KitError(f"OUTPUT={self.output} is for the answers to PROMPTS: set PROMPTS, or leave OUTPUT empty")
        if self.system and self.mode == "complete":
            raise KitError("SYSTEM has no effect with MODE=complete: leave it empty, or set MODE=chat")
