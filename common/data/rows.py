"""Fine-tuning rows of three formats to one: a list of {"role", "content"} messages."""

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
_ROW_FIELDS = ("tools", "functions", "history")
_MESSAGE_FIELDS = ("tool_calls", "function_call", "loss", "weight")

Message = dict[str, str]


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


def to_messages(row: dict[str, Any], kind: str, roles: str) -> list[Message]:
    """The messages of `row`, which is of format `kind`; raises BadRowError naming the field that is wrong.

    roles, for instruction rows: "system": instruction is the system's turn (none when empty), input the user's;
    "alpaca": instruction, a newline and input are the user's turn.
    """
    for name in _ROW_FIELDS:
        if row.get(name):
            raise BadRowError(f"field '{name}' is not built: remove it, or write the turns as messages")
    if kind == "instruction":
        messages = _from_instruction(row, roles)
    elif kind == "messages":
        messages = _from_list(row, "messages", "role", "content", {role: role for role in ROLES})
    else:
        messages = _from_list(row, "conversations", "from", "value", _SHAREGPT)
    if messages[0]["role"] == "assistant":
        raise BadRowError("it begins with the assistant's turn: there is nothing that it answers")
    if all(message["role"] != "assistant" for message in messages):
        raise BadRowError("it has no turn of the assistant: there is nothing to learn")
    if any(message["role"] == "system" for message in messages[1:]):
        raise BadRowError("a system turn stands after the first turn")
    return messages


def _optional(row: dict[str, Any], name: str) -> str:
    return "" if row.get(name) is None else string_field(row, name)


def _from_instruction(row: dict[str, Any], roles: str) -> list[Message]:
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
    return [*first, {"role": "user", "content": user}, answer]


def _from_list(row: dict[str, Any], field: str, role: str, content: str, names: dict[str, str]) -> list[Message]:
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"field '{field}' holds no list of turns")
    system = _optional(row, "system")
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRowError(f"{field}: turn {number} is no object")
        for name in _MESSAGE_FIELDS:
            if turn.get(name) is not None:
                raise BadRowError(f"{field}: turn {number}: field '{name}' is not built: remove it")
        try:
            who, text = string_field(turn, role), string_field(turn, content)
        except BadRowError as error:
            raise BadRowError(f"{field}: turn {number}: {error}") from None
        if who not in names:
            raise BadRowError(f"{field}: turn {number}: {role} '{who}' is not one of {', '.join(names)}")
        messages.append({"role": names[who], "content": text})
    return messages
