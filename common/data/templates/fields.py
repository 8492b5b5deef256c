"""What the fields of rows and turns mean: what a turn counts in the loss, what is metadata, what is refused by name.

Of a turn's fields those listed here are allowed and every other one is refused: it may be part of what is to be
learned. A row has metadata of many names (id, source, ...), so of its fields those are refused that change what is
learned; the others are counted by name.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from common.data.sources.jsonl import BadRowError

# A turn's loss: the kit's own, ms-swift's and OpenAI's names of a weight; axolotl's of a yes or no.
WEIGHTS = ("loss", "weight", "loss_scale")
SWITCHES = ("train", "training")
# What a model thinks before it answers, as DeepSeek and vLLM, OpenRouter, and gpt-oss name it.
REASONING = ("reasoning_content", "reasoning", "thinking")
TURN_FIELDS = frozenset(
    ("role", "from", "content", "value", "tool_calls", "name", "tool_call_id", *WEIGHTS, *SWITCHES, *REASONING)
)
# Of exports and logs of chats; no template shows them, and nothing of what is learned hangs on them.
TURN_METADATA = frozenset(
    ("id", "message_id", "parent_id", "turn", "turn_id", "turn_identifier", "index", "timestamp", "created_at")
    + ("create_time", "update_time", "date", "model", "source", "lang", "language", "country", "state", "header")
    + ("hashed_ip", "redacted", "toxic", "tokens", "num_tokens", "token_count", "finish_reason")
)
ROW_FIELDS = ("system", "tools", "chat_template_kwargs")

_LARGEST, _LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_MEDIA = "is of pictures or sound, and only text is learned: leave such rows out, or remove the field"
_PREFERENCE = "is not learned, the turns alone are: remove the field if that is meant"
_OWN_LOSS = "is not followed: say what a turn counts by a field 'loss' in the turn (true, false or a weight)"
_TURNS = "is not built: remove it, or write the turns as messages"
_SYSTEM = "is not read: call it 'system'"
_REASONING = "is not read in a row: write it into the assistant's turn that it belongs to"
_media = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio", "objects")
_masks = ("mask", "masks", "loss_mask")

REFUSED_OF_TURN = {
    **dict.fromkeys(_media, _MEDIA),
    **dict.fromkeys(_masks, _OWN_LOSS),
    "function_call": "is not built: write it as 'tool_calls'",
}
REFUSED_OF_ROW = {
    **dict.fromkeys(_media, _MEDIA),
    **dict.fromkeys((*_masks, *WEIGHTS, *SWITCHES, "weights", "loss_weight", "loss_weights"), _OWN_LOSS),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(("label", "labels", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("functions", "function_call", "history", "documents"), _TURNS),
    **dict.fromkeys(("system_prompt", "system_message"), _SYSTEM),
    **dict.fromkeys(REASONING, _REASONING),
}


def is_nothing(value: Any) -> bool:
    """Whether a field says nothing: null, or an empty string, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def unused_of_row(row: dict[str, Any], used: Collection[str]) -> list[str]:
    """The names of the fields of `row` beside `used`; raises BadRowError for one that changes what is learned."""
    unused = [name for name in row if name not in used and not is_nothing(row[name])]
    for name in unused:
        if name in REFUSED_OF_ROW:
            raise BadRowError(f"field '{name}' {REFUSED_OF_ROW[name]}")
    return unused


def unused_of_turn(turn: dict[str, Any]) -> list[str]:
    """The names of the metadata in `turn`; raises BadRowError for a field that is neither that nor used."""
    unused = [name for name in turn if name not in TURN_FIELDS and not is_nothing(turn[name])]
    for name in unused:
        if name not in TURN_METADATA:
            cause = REFUSED_OF_TURN.get(name, "is not known in a turn: what it says would be lost; remove or rename it")
            raise BadRowError(f"field {name[:80]!r} {cause}")
    return unused


def loss_of_turn(turn: dict[str, Any], learnable: bool) -> float | None:
    """What `turn` says that it counts in the loss, from 0 on and as float32 holds it; None when it says nothing.

    Raises BadRowError for what is no such number, for two fields that say it, and for a turn that is not `learnable`
    and counts.
    """
    name = one_of(turn, (*WEIGHTS, *SWITCHES))
    if name is None:
        return None
    loss = number_of(name, turn[name])
    if loss and not learnable:
        raise BadRowError(f"field '{name}' is {turn[name]}, but only an assistant's turn can be learned")
    return loss


def number_of(name: str, value: Any) -> float:
    """The weight that field `name` gives as `value`; raises BadRowError."""
    if name in SWITCHES:
        if value not in (0, 1):
            raise BadRowError(f"field '{name}' is {_short(value)}: give true or false")
        return float(value)
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= _LARGEST:
        raise BadRowError(
            f"field '{name}' is {_short(value)}: give true, false or a weight from 0 on that a float32 holds"
        )
    if 0 < value < _LEAST:
        raise BadRowError(f"field '{name}' is {_short(value)}, too little for a float32: give 0, or more")
    return float(value)


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"  # repr refuses one of more than 4,300 digits
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def one_of(record: dict[str, Any], names: Collection[str]) -> str | None:
    """The one of `names` that `record` has and that is not null; raises BadRowError when it has two."""
    found = [name for name in names if record.get(name) is not None]
    if len(found) > 1:
        raise BadRowError(f"it has the fields {' and '.join(map(repr, found))}, which say the same: keep one")
    return found[0] if found else None


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """`record` without the fields that are null, as exports of tables have them for absent ones."""
    return {name: value for name, value in record.items() if value is not None}


def numbers(value: Any) -> Iterator[int | float]:
    """All numbers within a JSON value."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list):
            left += each
        elif isinstance(each, (int, float)):
            yield each
