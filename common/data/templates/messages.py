"""One turn of a row, in the OpenAI or the ShareGPT format, to a message for the chat template."""

from typing import Any, NamedTuple

from common.data.sources.bad_rows import BadRowError
from common.data.sources.jsonl import json_type, string_field
from common.data.templates.fields import REASONING, is_empty, only_field, turn_loss, unused_turn_fields
from common.data.templates.tool_calls import parse_function_call_turn, parse_tool_calls

Message = dict[str, Any]
FUNCTION_CALL = "function_call"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    FUNCTION_CALL: "assistant",
    "tool": "tool",
    "observation": "tool",
}

_BASIC_FIELDS = frozenset(("role", "from", "content", "value", "tool_calls"))


class Turn(NamedTuple):
    """A parsed turn.

    message: as chat templates take it. loss: its weight, or None. reasoning: the name of its reasoning field, or "".
    unused: the names of its metadata fields.
    """

    message: Message
    loss: float | None
    reasoning: str
    unused: list[str]


def parse_turn(turn: Any) -> Turn:
    """The parsed `turn`; raises BadRowError that names the invalid field."""
    if not isinstance(turn, dict):
        raise BadRowError("it is not an object")
    role_field = only_field(turn, ("role", "from")) or ("from" if "from" in turn else "role")
    role = string_field(turn, role_field)
    if role not in ROLES:
        raise BadRowError(f"{role_field} {role[:80]!r} is not one of {', '.join(ROLES)}")
    message: Message = {"role": ROLES[role]}
    text_field = only_field(turn, ("content", "value")) or ("value" if role_field == "from" else "content")
    calls = turn.get("tool_calls")
    if is_empty(calls):
        message |= _call_of(turn, text_field) if role == FUNCTION_CALL else {"content": text_of(turn, text_field)}
    elif message["role"] != "assistant" or role == FUNCTION_CALL:
        raise BadRowError("field 'tool_calls' is only allowed in an assistant turn")
    else:
        # OpenAI rows omit the content, or set it to null, when an assistant turn only calls tools.
        text = "" if turn.get(text_field) is None else text_of(turn, text_field)
        message |= {"content": text, "tool_calls": parse_tool_calls(calls)}
    return Turn(message, None, "", []) if turn.keys() <= _BASIC_FIELDS else _with_other_fields(turn, message)


def _with_other_fields(turn: dict[str, Any], message: Message) -> Turn:
    """The turn of `message` with its other fields."""
    unused = unused_turn_fields(turn)
    for name in ("name", "tool_call_id"):
        if not is_empty(turn.get(name)):
            message[name] = string_field(turn, name)
    is_answer = message["role"] == "assistant"
    reasoning = _reasoning_of(turn)
    if reasoning:
        if not is_answer:
            raise BadRowError(f"field '{reasoning}' is only allowed in an assistant turn")
        message[REASONING[0]] = turn[reasoning]
    return Turn(message, turn_loss(turn, is_answer), reasoning, unused)


def _call_of(turn: dict[str, Any], text_field: str) -> Message:
    return {"content": "", "tool_calls": parse_function_call_turn(turn.get(text_field))}


def _reasoning_of(turn: dict[str, Any]) -> str:
    """The name of the turn's reasoning field, or ""; raises BadRowError when two fields differ."""
    found = [name for name in REASONING if not is_empty(turn.get(name))]
    if len({string_field(turn, name) for name in found}) > 1:
        raise BadRowError(f"its fields {' and '.join(map(repr, found))} differ: keep one")
    return found[0] if found else ""


def text_of(turn: dict[str, Any], name: str) -> str:
    """The string in field `name`, or the concatenated texts of its content parts; raises BadRowError."""
    parts = turn.get(name)
    if not isinstance(parts, list):
        return string_field(turn, name)
    return "".join(_text_of_part(part, name) for part in parts)


def _text_of_part(part: Any, name: str) -> str:
    if not isinstance(part, dict):
        raise BadRowError(f"field '{name}' holds a JSON array with a {json_type(part)}, not parts of type 'text'")
    kind = part.get("type")
    more = [each for each in part if each not in ("type", "text") and not is_empty(part[each])]
    if kind != "text" or more:
        what = f"of type {str(kind)[:80]!r}" if kind != "text" else f"with the field '{more[0][:80]}'"
        raise BadRowError(f"field '{name}' holds a part {what}: only text is supported; remove such rows")
    return string_field(part, "text")
