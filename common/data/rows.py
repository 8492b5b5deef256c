"""Fine-tuning rows of three formats to one: messages, what each counts in the loss, and the tools."""

import json
import math
from dataclasses import dataclass
from typing import Any

from common.data.jsonl import BadRowError, string_field

FORMATS = ("instruction", "messages", "conversations")
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# What these say would be lost in silence, so a row that has one is refused.
_ROW_FIELDS = ("functions", "history")
_MESSAGE_FIELDS = ("function_call", "weight")

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """messages: {"role", "content"} and "tool_calls" where there are any, as chat templates take them.

    losses: for each message what the row says of its loss: a weight from 0 on, or None where it says nothing.
    """

    messages: list[Message]
    losses: list[float | None]
    tools: list[dict[str, Any]] | None = None


def format_of(row: dict[str, Any]) -> str:
    """The format that the fields of `row` tell; raises BadRowError when they tell none, or two."""
    found = [name for name in FORMATS[1:] if name in row]
    if "instruction" in row or {"input", "output"} <= set(row):
        found = ["instruction", *found]
    if not found:
        raise BadRowError(
            f"its fields {', '.join(map(repr, row)) or '(none)'} are of no known format: it needs instruction, input"
            " and output, or messages, or conversations"
        )
    if len(found) > 1:
        raise BadRowError(f"it has the fields of {' and '.join(found)}: set FORMAT to the one that is meant")
    return found[0]


def to_conversation(row: dict[str, Any], kind: str, roles: str) -> Conversation:
    """The conversation of `row`, which is of format `kind`; raises BadRowError naming the field that is wrong.

    roles, for instruction rows: "system": instruction is the system's turn (none when empty), input the user's;
    "alpaca": instruction, a newline and input are the user's turn.
    """
    for name in _ROW_FIELDS:
        if row.get(name):
            raise BadRowError(f"field '{name}' is not built: remove it, or write the turns as messages")
    if kind == "instruction":
        talk = _from_instruction(row, roles)
    elif kind == "messages":
        talk = _from_list(row, "messages", "role", "content", {role: role for role in ROLES})
    else:
        talk = _from_list(row, "conversations", "from", "value", _SHAREGPT)
    roles_there = [message["role"] for message in talk.messages]
    if roles_there[0] == "assistant":
        raise BadRowError("it begins with the assistant's turn: there is nothing that it answers")
    if "assistant" not in roles_there:
        raise BadRowError("it has no turn of the assistant: there is nothing to learn")
    if "system" in roles_there[1:]:
        raise BadRowError("a system turn stands after the first turn")
    if all(loss == 0 for role, loss in zip(roles_there, talk.losses, strict=True) if role == "assistant"):
        raise BadRowError("its fields 'loss' leave nothing to learn")
    return talk


def to_messages(row: dict[str, Any], kind: str, roles: str) -> list[Message]:
    """The messages of `to_conversation`."""
    return to_conversation(row, kind, roles).messages


def _optional(row: dict[str, Any], name: str) -> str:
    return "" if row.get(name) is None else string_field(row, name)


def _from_instruction(row: dict[str, Any], roles: str) -> Conversation:
    answer = {"role": "assistant", "content": string_field(row, "output")}
    system = _optional(row, "system")
    if roles == "alpaca":
        user = string_field(row, "instruction")
        more = _optional(row, "input")
        if not user:
            raise BadRowError("field 'instruction' is empty: with ROLES=alpaca it is the user's turn")
        user = f"{user}\n{more}" if more else user
    else:
        if system:
            raise BadRowError("field 'system' stands beside ROLES=system, which makes instruction the system's turn")
        system, user = _optional(row, "instruction"), _optional(row, "input")
        if not user:
            raise BadRowError(
                "field 'input' is empty: with ROLES=system it is the user's turn; set ROLES=alpaca if instruction is"
            )
    first = [{"role": "system", "content": system}] if system else []
    messages = [*first, {"role": "user", "content": user}, answer]
    return Conversation(messages, [*[None] * (len(messages) - 1), _loss_of(row)], _tools_of(row))


def _from_list(row: dict[str, Any], field: str, role: str, content: str, names: dict[str, str]) -> Conversation:
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"field '{field}' holds no list of turns")
    system = _optional(row, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    losses: list[float | None] = [None] * len(messages)
    for number, turn in enumerate(turns, 1):
        try:
            message = _message_of(turn, role, content, names)
            loss = _loss_of(turn)
            if loss and message["role"] != "assistant":
                raise BadRowError(f"field 'loss' is {turn['loss']}, but only an assistant's turn can be learned")
        except BadRowError as error:
            raise BadRowError(f"{field}: turn {number}: {error}") from None
        messages.append(message)
        losses.append(loss)
    return Conversation(messages, losses, _tools_of(row))


def _message_of(turn: Any, role: str, content: str, names: dict[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError("it is no object")
    for name in _MESSAGE_FIELDS:
        if turn.get(name) is not None:
            raise BadRowError(f"field '{name}' is not built: remove it; the loss of a turn is its field 'loss'")
    calls = turn.get("tool_calls")
    who = string_field(turn, role)
    # Where an assistant only calls tools, OpenAI's rows have no content or null.
    text = _optional(turn, content) if calls else string_field(turn, content)
    if who not in names:
        raise BadRowError(f"{role} '{who}' is not one of {', '.join(names)}")
    message: Message = {"role": names[who], "content": text}
    if calls:
        if message["role"] != "assistant":
            raise BadRowError("field 'tool_calls' stands in a turn that is not the assistant's")
        message["tool_calls"] = _calls_of(calls)
    return message


def _calls_of(calls: Any) -> list[dict[str, Any]]:
    """The calls as templates take them: `arguments` an object, where OpenAI's rows have its JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRowError("field 'tool_calls' holds no list of objects")
    found = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError("field 'tool_calls' holds a call without a function's name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise BadRowError(f"the arguments of the call of {function['name']} are no JSON") from None
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRowError("field 'tools' is a string that is no JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError("field 'tools' holds no list of objects, each one tool")
    return tools


def _loss_of(turn: dict[str, Any]) -> float | None:
    loss = turn.get("loss")
    if loss is None:
        return None
    if not isinstance(loss, (bool, int, float)) or not 0 <= loss < math.inf:
        raise BadRowError(f"field 'loss' is {loss!r}: give true, false or a weight from 0 on")
    return float(loss)


def is_weighted(talk: Conversation) -> bool:
    """Whether a loss is neither 0 nor 1, so that a mask of whole numbers cannot hold it."""
    return any(loss not in (None, 0.0, 1.0) for loss in talk.losses)
