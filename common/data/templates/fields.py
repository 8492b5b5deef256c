"""The fields of rows and turns: loss weights, metadata, and fields that are rejected by name.

A turn may only have the fields listed here, since any other might be part of the training target. Rows carry metadata
under many names (id, source, ...), so a row is only rejected for fields that would change what is trained on; its
other fields are counted by name.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from common.data.sources.bad_rows import BadRowError

# A turn's loss weight, as this kit, OpenAI and ms-swift name it; and axolotl's boolean.
WEIGHTS = ("loss", "weight", "loss_scale")
SWITCHES = ("train", "training")
# The reasoning before an answer, as DeepSeek and vLLM, OpenRouter, and gpt-oss name it.
REASONING = ("reasoning_content", "reasoning", "thinking")
TURN_FIELDS = frozenset(
    ("role", "from", "content", "value", "tool_calls", "name", "tool_call_id", *WEIGHTS, *SWITCHES, *REASONING)
)
# Metadata of chat exports and logs; no template renders it, and it does not affect the loss.
TURN_METADATA = frozenset(
    ("id", "message_id", "parent_id", "turn", "turn_id", "turn_identifier", "index", "timestamp", "created_at")
    + ("create_time", "update_time", "date", "model", "source", "lang", "language", "country", "state", "header")
    + ("hashed_ip", "redacted", "toxic", "tokens", "num_tokens", "token_count", "finish_reason")
)
NOT_USED = "not used"  # ends the name under which an unused field is counted
ROW_FIELDS = ("system", "tools", "chat_template_kwargs")

_LARGEST, _LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_MEDIA = "is not supported, only text is: remove such rows, or the field"
_PREFERENCE = (
    "is a preference, and only the turns are trained on: remove the field if that is intended, or give both 'chosen'"
    " and 'rejected', for TRAIN_MODE=dpo"
)
_OWN_LOSS = "is not supported: set a turn's weight by a field 'loss' in the turn (true, false or a weight)"
_TURNS = "is not supported: remove it, or write the turns as messages"
_SYSTEM = "is not supported: rename it to 'system'"
_REASONING = "is not supported in a row: move it into its assistant turn"
_media = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio", "objects")
_masks = ("mask", "masks", "loss_mask")

REFUSED_OF_TURN = {
    **dict.fromkeys(_media, _MEDIA),
    **dict.fromkeys(_masks, _OWN_LOSS),
    "function_call": "is not supported: write it as 'tool_calls'",
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


def is_empty(value: Any) -> bool:
    """Whether a field is null, or an empty string, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def unused_row_fields(row: dict[str, Any], used: Collection[str]) -> list[str]:
    """The fields of `row` outside `used`; raises BadRowError for one that would change what is trained on."""
    unused = [name for name in row if name not in used and not is_empty(row[name])]
    for name in unused:
        if name in REFUSED_OF_ROW:
            raise BadRowError(f"field '{name}' {REFUSED_OF_ROW[name]}")
    return unused


def unused_turn_fields(turn: dict[str, Any]) -> list[str]:
    """The metadata fields of `turn`; raises BadRowError for a field that is neither metadata nor used."""
    unused = [name for name in turn if name not in TURN_FIELDS and not is_empty(turn[name])]
    for name in unused:
        if name not in TURN_METADATA:
            cause = REFUSED_OF_TURN.get(name, "is unknown in a turn and would be lost: remove or rename it")
            raise BadRowError(f"field {name[:80]!r} {cause}")
    return unused


def turn_loss(turn: dict[str, Any], learnable: bool) -> float | None:
    """The loss weight that `turn` sets, a non-negative float32; None when it sets none.

    Raises BadRowError for any other value, for two such fields, and for a positive weight where `learnable` is false.
    """
    name = only_field(turn, (*WEIGHTS, *SWITCHES))
    if name is None:
        return None
    loss = parse_loss(name, turn[name])
    if loss and not learnable:
        raise BadRowError(f"field '{name}' is {turn[name]}, but only assistant turns can be trained on")
    return loss


def parse_loss(name: str, value: Any) -> float:
    """The loss weight `value` of the field `name`; raises BadRowError."""
    if name in SWITCHES:
        if value not in (0, 1):
            raise BadRowError(f"field '{name}' is {_short(value)}: give true or false")
        return float(value)
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= _LARGEST:
        raise BadRowError(
            f"field '{name}' is {_short(value)}: give true, false or a non-negative weight that fits a float32"
        )
    if 0 < value < _LEAST:
        raise BadRowError(f"field '{name}' is {_short(value)}, too small for a float32: give 0, or more")
    return float(value)


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"  # repr refuses one of more than 4,300 digits
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def only_field(record: dict[str, Any], names: Collection[str]) -> str | None:
    """The only one of `names` that is not null in `record`, or None; raises BadRowError when there are two."""
    found = [name for name in names if record.get(name) is not None]
    if len(found) > 1:
        raise BadRowError(f"it has the fields {' and '.join(map(repr, found))}, which mean the same: keep one")
    return found[0] if found else None


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """`record` without its null fields, which table exports write for absent values."""
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
