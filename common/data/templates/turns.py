"""One turn of a row, in OpenAI's words or ShareGPT's, to the message that chat templates take."""

from typing import Any, NamedTuple

from common.data.sources.jsonl import BadRowError, kind_of_json, string_field
from common.data.templates.fields import REASONING, is_nothing, loss_of_turn, one_of, unused_of_turn
from common.data.templates.tool_calls import calls_of, calls_of_text

Message = dict[str, Any]
CALL = "function_call"
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
    CALL: "assistant",
    "tool": "tool",
    "observation": "tool",
}

_WORDS = frozenset(("role", "from", "content", "value", "tool_calls"))


class Turn(NamedTuple):
    """message: as templates take it; loss: what the row says of it, or None; reasoning: its field's name, or "".

    unused: the names of its fields of metadata.
    """

    message: Message
    loss: float | None
    reasoning: str
    unused: list[str]


def turn_of(turn: Any) -> Turn:
    """The turn that the object `turn` is; raises BadRowError naming the field that is wrong."""
    if not isinstance(turn, dict):
        raise BadRowError("it is no object")
    role_field = one_of(turn, ("role", "from")) or ("from" if "from" in turn else "role")
    who = string_field(turn, role_field)
    if who not in ROLES:
        raise BadRowError(f"{role_field} {who[:80]!r} is not one of {', '.join(ROLES)}")
    message: Message = {"role": ROLES[who]}
    text_field = one_of(turn, ("content", "value")) or ("value" if role_field == "from" else "content")
    calls = turn.get("tool_calls")
    if is_nothing(calls):
        message |= _call_of(turn, text_field) if who == CALL else {"content": text_of(turn, text_field)}
    elif message["role"] != "assistant" or who == CALL:
        raise BadRowError("field 'tool_calls' stands in a turn that is not the assistant's")
    else:
        # Where an assistant only calls tools, OpenAI's rows have no content or null.
        text = "" if turn.get(text_field) is None else text_of(turn, text_field)
        message |= {"content": text, "tool_calls": calls_of(calls)}
    return Turn(message, None, "", []) if turn.keys() <= _WORDS else _with_more(turn, message)


def _with_more(turn: dict[str, Any], message: Message) -> Turn:
    """The turn of `message`, with what stands beside its words and calls."""
    unused = unused_of_turn(turn)
    for name in ("name", "tool_call_id"):
        if not is_nothing(turn.get(name)):
            message[name] = string_field(turn, name)
    is_answer = message["role"] == "assistant"
    reasoning = _reasoning_of(turn)
    if reasoning:
        if not is_answer:
            raise BadRowError(f"field '{reasoning}' stands in a turn that is not the assistant's")
        message[REASONING[0]] = turn[reasoning]
    return Turn(message, loss_of_turn(turn, is_answer), reasoning, unused)


def _call_of(turn: dict[str, Any], text_field: str) -> Message:
    return {"content": "", "tool_calls": calls_of_text(turn.get(text_field))}


def _reasoning_of(turn: dict[str, Any]) -> str:
    """The name of the field with the turn's reasoning, "" when none has any; of two they must say the same."""
    found = [name for name in REASONING if not is_nothing(turn.get(name))]
    if len({string_field(turn, name) for name in found}) > 1:
        raise BadRowError(f"its fields {' and '.join(map(repr, found))} differ: keep one")
    return found[0] if found else ""


def text_of(turn: dict[str, Any], name: str) -> str:
    """The string in field `name`, or the texts of its list of parts one after the other; raises BadRowError."""
    parts = turn.get(name)
    if not isinstance(parts, list):
        return string_field(turn, name)
    return "".join(_text_of_part(part, name) for part in parts)


def _text_of_part(part: Any, name: str) -> str:
    if not isinstance(part, dict):
        raise BadRowError(f"field '{name}' holds a JSON array with a {kind_of_json(part)}, not parts of type 'text'")
    kind = part.get("type")
    more = [each for each in part if each not in ("type", "text") and not is_nothing(part[each])]
    if kind != "text" or more:
        what = f"of type {str(kind)[:80]!r}" if kind != "text" else f"with the field '{more[0][:80]}'"
        raise BadRowError(f"field '{name}' holds a part {what}: only text is learned; leave such rows out")
    return string_field(part, "text")
