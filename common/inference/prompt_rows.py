"""A file of prompts: rows in step 1's formats, or plain text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.sources.bad_rows import BadRowError, BadRows, to_bad_row_error
from common.data.sources.jsonl import first_rows, string_field
from common.data.templates.fields import is_empty
from common.data.templates.messages import ROLES
from common.data.templates.row_formats import Conversation, detect_format, to_conversation
from common.errors import KitError, reading
from common.inference.prompts import PromptEncoder
from common.log import logger

TEXT_FIELD = "text"
PLAIN = ".txt"  # the ending of a file of plain text
ANSWER_FIELDS = ("output", "finish_reason", "prompt_tokens", "output_tokens")
EXPECTED = "expected"  # the name under which a row's own `output` is kept


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt, and its fields for the row of its answer."""

    ids: list[int]
    fields: dict[str, Any]


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts in the mode "chat", "complete", or "auto": by each row; plain text is chat if there is a template.

    system: the system turn of conversations without their own. roles: as in step 1.
    template_kwargs: JSON of template variables, for rows without their own.
    """

    encoder: PromptEncoder
    mode: str = "auto"
    system: str = ""
    roles: str = "system"
    template_kwargs: str = ""

    def read(self, path: Path) -> list[Prompt]:
        """The prompts in `path`; raises KitError with file and line for one that cannot be used."""
        with reading(path), path.open("rb") as stream:
            stream.read(1)
        prompts = list(self._plain(path) if path.name.lower().endswith(PLAIN) else self._rows(path))
        if not prompts:
            raise KitError(f"PROMPTS={path} holds no prompt: give rows as step 1 takes them, or a .txt file")
        return prompts

    def _plain(self, path: Path) -> Iterator[Prompt]:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise KitError(f"{path} is not UTF-8 ({error}): convert it to UTF-8") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    ids = self.ids_of_line(line)
                except Exception as error:
                    raise KitError(f"{path}, line {number}: {to_bad_row_error(error)}") from None
                yield Prompt(ids, {"prompt": line})
        if blank := sum(not line.strip() for line in lines):
            logger.info("%s: %d blank lines are no prompts", path, blank)

    def ids_of_line(self, line: str) -> list[int]:
        """The ids of `line`, a user's turn or a text to complete; raises BadRowError."""
        line.encode()  # raises for half of a surrogate pair
        if self.mode == "complete" or self.encoder.template is None:
            return self.encoder.text_ids(line)
        return self.ids_of_turns([{"role": "user", "content": line}])

    def ids_of_turns(self, turns: list[dict[str, Any]]) -> list[int]:
        """The ids of a conversation of user's and assistant's turns that ends before an answer; raises BadRowError."""
        return self.encoder.chat_ids(self._conversation({"messages": turns}))

    def _rows(self, path: Path) -> Iterator[Prompt]:
        own_system = 0
        for chunk, offset, row in first_rows([path]):
            with BadRows(chunk).row(offset):
                if self._is_chat(row):
                    conversation = self._conversation(row)
                    ids = self.encoder.chat_ids(conversation)
                    own_system += conversation.messages[0] != self._system_turn
                else:
                    ids = self.encoder.text_ids(string_field(row, TEXT_FIELD))
                prompt = Prompt(ids, _fields(row))
            yield prompt
        if self.system and own_system:
            logger.info("%s: %d rows have a system turn of their own, which SYSTEM does not replace", path, own_system)

    def _is_chat(self, row: dict[str, Any]) -> bool:
        """Whether `row` is a conversation; raises BadRowError when it is not what MODE says."""
        try:
            detect_format(_with_answer(row))
        except BadRowError as error:
            if self.mode == "chat" or TEXT_FIELD not in row:
                raise BadRowError(f"{error}; a text to complete needs {TEXT_FIELD}") from None
            return False
        return self.mode != "complete"

    @property
    def _system_turn(self) -> dict[str, Any]:
        return {"role": "system", "content": self.system}

    def _conversation(self, row: dict[str, Any]) -> Conversation:
        """The turns of `row` before its last answer."""
        row = _with_answer(row)
        if self.template_kwargs and is_empty(row.get("chat_template_kwargs")):
            row["chat_template_kwargs"] = self.template_kwargs
        found = to_conversation(row, detect_format(row), self.roles)
        messages = found.messages[:-1]
        if self.system and messages[0]["role"] != "system":
            messages = [self._system_turn, *messages]
        return Conversation(messages, [None] * len(messages), found.tools, found.template_kwargs)


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of `row` that ends with an answer, as step 1 requires; one that it lacks is empty."""
    row = dict(row)
    for name in ("messages", "conversations"):
        turns = row.get(name)
        if isinstance(turns, list) and turns and not _is_answer(turns[-1]):
            row[name] = [*turns, {"role": "assistant", "content": ""}]
            return row
    if "output" not in row and ("instruction" in row or "input" in row):
        row["output"] = ""
    return row


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, dict) and ROLES.get(str(turn.get("role") or turn.get("from"))) == "assistant"


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of `row` that its answer's row repeats; its own `output` as EXPECTED."""
    kept = {EXPECTED if name == "output" else name: value for name, value in row.items()}
    taken = [name for name in (*ANSWER_FIELDS[1:], EXPECTED) if name in row]
    if taken and (taken != [EXPECTED] or "output" in row):
        raise BadRowError(f"its field {taken[0]!r} is one that the answer's row sets: rename or remove it")
    return kept
