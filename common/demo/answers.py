"""The answers of two models to the first rows of a file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from common.data.sources.bad_rows import BadRows
from common.data.sources.discovery import find_inputs
from common.data.sources.jsonl import first_rows, string_field
from common.data.templates.row_formats import (
    PREFERENCE,
    TEXT_FORMAT,
    Conversation,
    Message,
    detect_format,
    format_of_rows,
    to_messages,
)
from common.errors import KitError
from common.files import write_json
from common.inference.generation import Generator
from common.inference.model import ModelSettings
from common.inference.model_folder import open_model_folder
from common.inference.prompts import PromptEncoder, find_template
from common.inference.sampling import Sampling

ANSWERS = "answers.json"
TEXT_FIELD = "text"
# The prompt is at most this many characters of a text, and the expected continuation as many.
PROMPT_CHARACTERS = 60


@dataclass(frozen=True)
class Prompt:
    """A prompt, either a conversation or plain text, and the expected answer."""

    given: list[Message] | str
    expected: str

    @property
    def question(self) -> str:
        """The last turn, or the text."""
        return self.given if isinstance(self.given, str) else self.given[-1]["content"]


@dataclass(frozen=True)
class Answer:
    """A question, the expected answer, and those of the two models."""

    question: str
    expected: str
    before: str
    after: str


def kind_of(text: str) -> str:
    """The kind of data in the first row of INPUT `text`, "sft" or "pretrain"; raises KitError if it is neither."""
    kind = format_of_rows(find_inputs(text), TEXT_FIELD)
    if kind == PREFERENCE:
        raise KitError(
            f"INPUT={text} holds preferences, which the quickstart does not train on: give conversations or texts, or"
            " run the steps with TRAIN_MODE=dpo (docs/en/preferences.md)"
        )
    return "pretrain" if kind == TEXT_FORMAT else "sft"


def read_prompts(text: str, count: int, roles: str) -> list[Prompt]:
    """The prompts of the first `count` rows of INPUT `text`; raises KitError for an invalid row."""
    return list(islice(_prompts(text, roles), count))


def _prompts(text: str, roles: str) -> Iterator[Prompt]:
    kind = kind_of(text)
    for chunk, offset, row in first_rows(find_inputs(text)):
        with BadRows(chunk).row(offset):
            prompt = _of_text(row) if kind == "pretrain" else _of_conversation(row, roles)
        yield prompt


def _of_text(row: dict[str, Any]) -> Prompt:
    text = string_field(row, TEXT_FIELD)
    cut = min(PROMPT_CHARACTERS, len(text) // 2)
    return Prompt(text[:cut], text[cut : cut + PROMPT_CHARACTERS])


def _of_conversation(row: dict[str, Any], roles: str) -> Prompt:
    """The turns before the last answer, and that answer."""
    messages = to_messages(row, detect_format(row), roles)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return Prompt(messages[:last], messages[last]["content"])


def generate(folder: Path, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt by the model of `folder`; all prompts in one batch."""
    model = open_model_folder(folder)
    encoder = PromptEncoder(model.tokenizer, find_template(model.tokenizer, "auto"), model.room(max_new_tokens))
    ids = [
        encoder.text_ids(prompt.given)
        if isinstance(prompt.given, str)
        else encoder.chat_ids(Conversation(prompt.given, [None] * len(prompt.given)))
        for prompt in prompts
    ]
    greedy = Sampling(temperature=0, top_p=1, top_k=0, repetition_penalty=1)
    generator = Generator(model, ModelSettings(str(folder), device="cpu"), greedy, max_new_tokens, seed=0)
    return [answer.text for answer in generator.batch(ids)]


def ask(before: Path, after: Path, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
    """The answers of both models to each prompt."""
    texts = [generate(folder, prompts, max_new_tokens) for folder in (before, after)]
    return [
        Answer(prompt.question, prompt.expected, first, second)
        for prompt, first, second in zip(prompts, *texts, strict=True)
    ]


def save_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Writes `answers` to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"answers": [asdict(answer) for answer in answers]})


def load_answers(path: Path) -> list[Answer]:
    """The answers that `save_answers` wrote; raises KitError if they cannot be read."""
    try:
        return [Answer(**each) for each in json.loads(path.read_text(encoding="utf-8"))["answers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KitError(f"{path} holds no answers ({error!r}): remove it and run the same command again") from error
