"""Preference rows to a pair of conversations that share their prompt, for TRAIN_MODE=dpo.

    {"prompt": "2+2?", "chosen": "4", "rejected": "5"}                                          texts
    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}   answers
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}          whole conversations

Answers are a text, a turn, or a list of turns. Their prompt is in "prompt" (a text, which is a user turn, or turns), in
"messages" or "conversations", or in "instruction" and "input". So rows in the preference formats of trl (its guide on
dataset formats) and of LLaMA-Factory (its data/README.md) are taken as they are, except trl's texts without a prompt,
in which only a guess could tell the prompt from the answers.
"""

from typing import Any, NamedTuple

from common.data.sources.bad_rows import BadRowError
from common.data.sources.jsonl import string_field
from common.data.templates.fields import NOT_USED, ROW_FIELDS, unused_row_fields
from common.data.templates.messages import Message, parse_turn, text_of
from common.data.templates.row_formats import Conversation, to_conversation

ANSWERS = ("chosen", "rejected")
TURNS = ("messages", "conversations")
INSTRUCTION = ("instruction", "input")
_USED = frozenset((*ROW_FIELDS, *ANSWERS, "prompt", *TURNS, *INSTRUCTION))
_WHICH = "give the prompt as 'prompt' (a text, or turns), 'messages', 'conversations', or 'instruction' and 'input'"


class Pair(NamedTuple):
    """The same prompt with two answers, each the last turn of its conversation."""

    chosen: Conversation
    rejected: Conversation


def to_pair(row: dict[str, Any], roles: str) -> Pair:
    """The pair of `row`; raises BadRowError that names the invalid field, or why it is no pair.

    roles: as in `to_conversation`, for a prompt in "instruction" and "input".
    """
    unused = unused_row_fields(row, _USED)
    answers = [_turns_of(row, name) for name in ANSWERS]
    whole = [_role_of_first(name, turns) != "assistant" for name, turns in zip(ANSWERS, answers, strict=True)]
    if whole[0] != whole[1]:
        raise BadRowError("one of its 'chosen' and 'rejected' begins with its prompt and the other does not")
    prompt = [] if whole[0] else _prompt_of(row, roles)
    found = []
    for name, turns in zip(ANSWERS, answers, strict=True):
        try:
            found.append(_conversation(row, [*prompt, *turns]))
        except BadRowError as error:
            raise BadRowError(f"{name}: {error}") from None
    pair = Pair(*found)
    _check_pair(pair)
    if whole[0]:
        _check_repeated_prompt(row, answers[0], pair)
    pair.chosen.notes.extend(f"rows' field {name[:80]!r}, {NOT_USED}" for name in unused)
    return pair


def _turns_of(row: dict[str, Any], name: str) -> list[Any]:
    """The answer in the field `name` as a list of turns, as they are in the row."""
    value = row.get(name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"field '{name}' is not a text, a turn or a list of turns")
    return turns


def _role_of_first(name: str, turns: list[Any]) -> str:
    try:
        return str(parse_turn(turns[0]).message["role"])
    except BadRowError as error:
        raise BadRowError(f"{name}: turn 1: {error}") from None


def _prompt_of(row: dict[str, Any], roles: str) -> list[Any]:
    """The turns before the answers, as they are in the row; raises BadRowError unless they have one place."""
    found = [name for name in ("prompt", *TURNS) if row.get(name) is not None]
    if any(row.get(name) is not None for name in INSTRUCTION):
        found.append("instruction")
    if len(found) != 1:
        what = f"a prompt in {' and '.join(map(repr, found))}" if found else "answers without a prompt"
        raise BadRowError(f"it has {what}: {_WHICH}")
    if found[0] == "instruction":
        own = {name: row.get(name) for name in ("system", *INSTRUCTION)}
        return to_conversation({**own, "output": "answer"}, "instruction", roles).messages[:-1]
    value = row[found[0]]
    if isinstance(value, str) and found[0] == "prompt":
        return [{"role": "user", "content": string_field(row, "prompt")}]
    if not isinstance(value, list) or not value:
        raise BadRowError(f"field '{found[0]}' is not a list of turns{' or a text' * (found[0] == 'prompt')}")
    return value


def _conversation(row: dict[str, Any], turns: list[Any]) -> Conversation:
    """The conversation of `turns`, with the row's system turn and tools; it ends with the answer."""
    own = {name: row.get(name) for name in ROW_FIELDS}
    if row.get("instruction") is not None or row.get("input") is not None:
        own["system"] = None  # it is among the turns already
    conversation = to_conversation({**own, "messages": turns}, "messages", "system")
    if conversation.messages[-1]["role"] != "assistant":
        raise BadRowError(f"it ends with a turn of {conversation.messages[-1]['role']}, not with an answer")
    if any(loss is not None for loss in conversation.losses):
        raise BadRowError("a turn's loss is set, and of a preference the last answer alone is trained on: remove it")
    return conversation


def _check_pair(pair: Pair) -> None:
    """Raises BadRowError unless the two differ in their last turn, and in nothing else."""
    chosen, rejected = pair.chosen.messages, pair.rejected.messages
    if chosen[:-1] != rejected[:-1]:
        raise BadRowError(
            "its 'chosen' and 'rejected' differ before their last turn: give both the same prompt, since only last"
            " answers are compared"
        )
    if chosen[-1] == rejected[-1]:
        raise BadRowError("its 'chosen' and 'rejected' answers are equal: there is nothing to prefer")


def _check_repeated_prompt(row: dict[str, Any], chosen: list[Any], pair: Pair) -> None:
    """Raises BadRowError if a row of whole conversations has another prompt beside them; one of theirs is counted."""
    for name in ("prompt", *TURNS, *INSTRUCTION):
        value = row.get(name)
        if value is None:
            continue
        if not (_is_prompt_of(value, pair) or (name in TURNS and value == chosen)):
            raise BadRowError(
                f"its 'chosen' and 'rejected' are whole conversations, and field '{name}' is not in them: remove"
                f" '{name}', or the prompt from the two"
            )
        pair.chosen.notes.append(f"rows' field '{name}', which their conversations repeat, {NOT_USED}")


def _is_prompt_of(value: Any, pair: Pair) -> bool:
    """Whether `value` is the prompt of `pair`: its turns, or the text of one of its user turns."""
    prompt: list[Message] = pair.chosen.messages[:-1]
    if isinstance(value, str):
        return any(message["role"] == "user" and message["content"] == value for message in prompt)
    if not isinstance(value, list) or len(value) != len(prompt):
        return False
    return all(
        parse_turn(turn).message["role"] == message["role"]
        and text_of(turn, "content" if "content" in turn else "value") == message["content"]
        for turn, message in zip(value, prompt, strict=True)
    )
