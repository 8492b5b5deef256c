"""Fine-tuning rows in three formats to a `Conversation`: messages, their loss weights, and tools."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.data.sources.bad_rows import BadRowError
from common.data.sources.jsonl import first_row, string_field
from common.data.templates.fields import NOT_USED, ROW_FIELDS, is_empty, parse_loss, unused_row_fields, without_nulls
from common.data.templates.messages import Message, parse_turn
from common.data.templates.tool_calls import check_numbers, load_json, parse_tools

FORMATS = ("instruction", "messages", "conversations")
PREFERENCE = "preference"  # two answers to a prompt, which templates/preference_rows.py reads
TEXT_FORMAT = "text"  # a row of pretraining, which no template renders
_COLUMNS = {
    "instruction": ("instruction", "input", "output"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    PREFERENCE: ("chosen", "rejected"),
}
_USED = {
    kind: frozenset((*ROW_FIELDS, *columns, *(["loss"] if kind == "instruction" else [])))
    for kind, columns in _COLUMNS.items()
}


@dataclass(frozen=True)
class Conversation:
    """A fine-tuning row as chat templates take it.

    messages: "role" and "content", and optionally "tool_calls", "reasoning_content", "name" and "tool_call_id".
    losses: the loss weight that the row sets for each message, or None.
    template_kwargs: the row's chat_template_kwargs.
    reasoning: message index to the name of its reasoning field in the row ("reasoning_content" in the message).
    notes: what the log counts, such as unused fields.
    """

    messages: list[Message]
    losses: list[float | None]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    reasoning: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def detect_format(row: dict[str, Any]) -> str:
    """The format of `row` by its fields that are not null; raises BadRowError when none or several match.

    A row with two answers is a preference, whatever its prompt is in.
    """
    if all(row.get(name) is not None for name in _COLUMNS[PREFERENCE]):
        return PREFERENCE
    found = [name for name in FORMATS[1:] if row.get(name) is not None]
    if row.get("instruction") is not None or (row.get("input") is not None and row.get("output") is not None):
        found = ["instruction", *found]
    if not found:
        raise BadRowError(
            f"its fields {', '.join(map(repr, row)) or '(none)'} match no known format: it needs instruction, input"
            " and output, or messages, or conversations; or for preferences chosen and rejected"
        )
    if len(found) > 1:
        raise BadRowError(f"it has the fields of {' and '.join(found)}: set FORMAT to the intended one")
    return found[0]


def format_of_rows(files: list[Path], json_key: str) -> str:
    """The format of the first row in `files`: one of FORMATS, PREFERENCE, or TEXT_FORMAT where it only has `json_key`.

    Raises KitError when it is neither, or there is no row.
    """
    chunk, offset, row = first_row(files)
    try:
        return detect_format(row)
    except BadRowError as error:
        if json_key in row:
            return TEXT_FORMAT
        raise chunk.error(offset, f"{error}; for pretraining it needs {json_key}") from None


def check_format(row: dict[str, Any], first: str) -> str:
    """The format of `row` in data whose first row is of format `first`; raises BadRowError when they do not mix.

    A row may only differ in a table that concatenates several formats: it then has the columns of `first`, all null.
    """
    kind = detect_format(row)
    null = [row[name] is None for name in _COLUMNS[first] if name in row]
    if kind != first and not (null and all(null)):
        raise BadRowError(f"it is of format {kind}, the first row of {first}: preprocess each format separately")
    return kind


def to_conversation(row: dict[str, Any], kind: str, roles: str) -> Conversation:
    """The conversation of `row`, which is of format `kind`; raises BadRowError that names the invalid field.

    roles, for instruction rows: with "system", instruction is the system turn (none when empty) and input the user
    turn; with "alpaca", instruction, a newline and input form the user turn.
    """
    if kind == PREFERENCE:
        raise BadRowError("it is a preference, with the fields chosen and rejected, and a conversation is needed here")
    unused = unused_row_fields(row, _USED[kind])
    conversation = _from_instruction(row, roles) if kind == "instruction" else _from_messages(row, kind)
    conversation.notes.extend(f"rows' field {name[:80]!r}, {NOT_USED}" for name in unused)
    message_roles = [message["role"] for message in conversation.messages]
    if message_roles[0] == "assistant":
        raise BadRowError("it begins with an assistant turn, which answers nothing: remove that turn")
    if "assistant" not in message_roles:
        raise BadRowError("it has no assistant turn: there is nothing to train on")
    if "system" in message_roles[1:]:
        raise BadRowError("a system turn is only allowed as the first turn")
    if all(loss == 0 for role, loss in zip(message_roles, conversation.losses, strict=True) if role == "assistant"):
        raise BadRowError("its fields 'loss' exclude every assistant turn: there is nothing to train on")
    return conversation


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
            raise BadRowError("field 'instruction' is empty: with ROLES=alpaca it is the user turn")
        user = f"{user}\n{more}" if more else user
    else:
        if system:
            raise BadRowError("field 'system' conflicts with ROLES=system, which makes instruction the system turn")
        system, user = _optional(row, "instruction"), _optional(row, "input")
        if not user:
            raise BadRowError(
                "field 'input' is empty: with ROLES=system it is the user turn; set ROLES=alpaca if instruction is"
            )
    first = [{"role": "system", "content": system}] if system else []
    messages = [*first, {"role": "user", "content": user}, answer]
    loss = None if row.get("loss") is None else parse_loss("loss", row["loss"])
    return Conversation(messages, [*[None] * (len(messages) - 1), loss], parse_tools(row), _template_kwargs(row))


def _from_messages(row: dict[str, Any], kind: str) -> Conversation:
    turns = row.get(kind)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"field '{kind}' is not a list of turns")
    system = _optional(row, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    conversation = Conversation(messages, [None] * len(messages), parse_tools(row), _template_kwargs(row))
    for number, turn in enumerate(turns, 1):
        try:
            made = parse_turn(turn)
        except BadRowError as error:
            raise BadRowError(f"{kind}: turn {number}: {error}") from None
        if made.reasoning:
            conversation.reasoning[len(messages)] = made.reasoning
        messages.append(made.message)
        conversation.losses.append(made.loss)
        conversation.notes.extend(f"turns' field {name!r}, {NOT_USED}" for name in made.unused)
    return conversation


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """The row's chat_template_kwargs, an object or its JSON."""
    name = "chat_template_kwargs"
    given = row.get(name)
    if isinstance(given, str) and given.strip():
        given = load_json(given, f"field '{name}'")
    if is_empty(given):
        return {}
    if not isinstance(given, dict):
        raise BadRowError(f"field '{name}' is not an object of template variables")
    check_numbers(given, f"field '{name}'")
    return without_nulls(given)


def is_weighted(conversation: Conversation) -> bool:
    """Whether a loss weight is neither 0 nor 1, so that an integer mask cannot hold it."""
    return any(loss not in (None, 0.0, 1.0) for loss in conversation.losses)
