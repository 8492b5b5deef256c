"""Fine-tuning rows of three formats to one: messages, what each counts in the loss, and the tools."""

from dataclasses import dataclass, field
from typing import Any

from common.data.sources.jsonl import BadRowError, string_field
from common.data.templates.fields import ROW_FIELDS, is_nothing, number_of, unused_of_row, without_nulls
from common.data.templates.tool_calls import check_numbers, load_json, tools_of
from common.data.templates.turns import Message, turn_of
from common.data.tokenizer.encoded import NOT_USED

FORMATS = ("instruction", "messages", "conversations")
_COLUMNS = {
    "instruction": ("instruction", "input", "output"),
    "messages": ("messages",),
    "conversations": ("conversations",),
}
_USED = {
    kind: frozenset((*ROW_FIELDS, *columns, *(["loss"] if kind == "instruction" else [])))
    for kind, columns in _COLUMNS.items()
}


@dataclass(frozen=True)
class Conversation:
    """messages: {"role", "content"}, and where there are any "tool_calls", "reasoning_content", "name" and
    "tool_call_id", as chat templates take them.

    losses: for each message what the row says of its loss: a weight from 0 on, or None where it says nothing.
    template_kwargs: what the template gets beside messages and tools.
    reasoning: by the message's number, the name that the row gives to what is "reasoning_content" here.
    notes: what the report counts, as that a field is not used.
    """

    messages: list[Message]
    losses: list[float | None]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    reasoning: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def format_of(row: dict[str, Any]) -> str:
    """The format that the fields of `row` tell, null ones apart; raises BadRowError when they tell none, or two."""
    found = [name for name in FORMATS[1:] if row.get(name) is not None]
    if row.get("instruction") is not None or (row.get("input") is not None and row.get("output") is not None):
        found = ["instruction", *found]
    if not found:
        raise BadRowError(
            f"its fields {', '.join(map(repr, row)) or '(none)'} are of no known format: it needs instruction, input"
            " and output, or messages, or conversations"
        )
    if len(found) > 1:
        raise BadRowError(f"it has the fields of {' and '.join(found)}: set FORMAT to the one that is meant")
    return found[0]


def format_among(row: dict[str, Any], first: str) -> str:
    """The format of `row` in data whose first row is of format `first`; raises BadRowError when it may not be there.

    Of another format may be a row of a joined table, which has the columns of `first` too, all of them null.
    """
    kind = format_of(row)
    null = [row[name] is None for name in _COLUMNS[first] if name in row]
    if kind != first and not (null and all(null)):
        raise BadRowError(f"it is of format {kind}, the first row of {first}: make data of its own of each")
    return kind


def to_conversation(row: dict[str, Any], kind: str, roles: str) -> Conversation:
    """The conversation of `row`, which is of format `kind`; raises BadRowError naming the field that is wrong.

    roles, for instruction rows: "system": instruction is the system's turn (none when empty), input the user's;
    "alpaca": instruction, a newline and input are the user's turn.
    """
    unused = unused_of_row(row, _USED[kind])
    talk = _from_instruction(row, roles) if kind == "instruction" else _from_list(row, kind)
    talk.notes.extend(f"rows' field {name[:80]!r}, {NOT_USED}" for name in unused)
    roles_there = [message["role"] for message in talk.messages]
    if roles_there[0] == "assistant":
        raise BadRowError("it begins with the assistant's turn: there is nothing that it answers; remove that turn")
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
    loss = None if row.get("loss") is None else number_of("loss", row["loss"])
    return Conversation(messages, [*[None] * (len(messages) - 1), loss], tools_of(row), _template_kwargs(row))


def _from_list(row: dict[str, Any], kind: str) -> Conversation:
    turns = row.get(kind)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"field '{kind}' holds no list of turns")
    system = _optional(row, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    talk = Conversation(messages, [None] * len(messages), tools_of(row), _template_kwargs(row))
    for number, turn in enumerate(turns, 1):
        try:
            made = turn_of(turn)
        except BadRowError as error:
            raise BadRowError(f"{kind}: turn {number}: {error}") from None
        if made.reasoning:
            talk.reasoning[len(messages)] = made.reasoning
        messages.append(made.message)
        talk.losses.append(made.loss)
        talk.notes.extend(f"turns' field {name!r}, {NOT_USED}" for name in made.unused)
    return talk


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """What the row gives the template beside its turns, an object or its JSON."""
    name = "chat_template_kwargs"
    given = row.get(name)
    if isinstance(given, str) and given.strip():
        given = load_json(given, f"field '{name}'")
    if is_nothing(given):
        return {}
    if not isinstance(given, dict):
        raise BadRowError(f"field '{name}' holds no object of the template's own settings")
    check_numbers(given, f"field '{name}'")
    return without_nulls(given)


def is_weighted(talk: Conversation) -> bool:
    """Whether a loss is neither 0 nor 1, so that a mask of whole numbers cannot hold it."""
    return any(loss not in (None, 0.0, 1.0) for loss in talk.losses)
