"""The shape that an old script's flags give the model, compared with the config.json that decides here."""

from pathlib import Path
from typing import Any

from common.adopt.command_line import Flag
from common.adopt.draft import CHANGED, HERE, PROBLEM, Draft
from common.adopt.lengths import as_number
from common.adopt.table import Row
from common.errors import KitError
from common.json_file import read_json
from common.model.shape.config import QwenConfig

# Fields that a wrong value does no harm to, in a run that starts from weights.
REMEDY = "give another --hf-model-path"
HARMLESS = ("max_position_embeddings", "initializer_range")


def base_vocabulary(folder: Path) -> int | None:
    """Tokens of the model's vocabulary without the added ones, as the old kits count them; None if no file says so."""
    if (folder / "vocab.json").is_file():
        return len(read_json(folder / "vocab.json", REMEDY))
    if (folder / "tokenizer.json").is_file():
        return len(read_json(folder / "tokenizer.json", REMEDY)["model"]["vocab"])
    return None


def compare(draft: Draft, row: Row, flag: Flag, vocabulary: int | None) -> None:
    """A remark on a flag of the model's shape: as in config.json, or a problem, or not compared."""
    field = row.argument
    if draft.qwen is None:
        silent = flag.line or field in ("qk_norm", "tie_word_embeddings")  # right without the flag, too
        kind, text = (HERE, "from config.json here") if silent else (CHANGED, "config.json decides here")
        why = f", and --hf-model-path compares it; {row.text(flag.value)}" if row.note else ""
        draft.note(kind, flag, f"{text}, {field}{why}")
        return
    own = getattr(draft.qwen, field)
    given = _given(flag, field, vocabulary)
    if given is None:
        draft.note(PROBLEM, flag, f"it cannot be compared with config.json's {field}={_shown(own)}, which decides here")
    elif given == own:
        draft.note(HERE, flag, f"from config.json here, which has the same {field}={_shown(own)}")
    else:
        kind = CHANGED if field in HARMLESS else PROBLEM
        why = f"; {row.text(flag.value)}" if row.note else ""
        draft.note(kind, flag, f"config.json has {field}={_shown(own)}, not {_shown(given)}, and decides here{why}")


def _given(flag: Flag, field: str, vocabulary: int | None) -> Any:
    """The flag's value in config.json's terms; None if it has no such value."""
    if field in ("qkv_bias", "qk_norm", "tie_word_embeddings"):
        return (flag.value != "false") != (field == "tie_word_embeddings")
    number = as_number(flag.value)
    if number is None or flag.name != "--extra-vocab-size":
        return number
    return None if vocabulary is None else vocabulary + number


def check_layout(draft: Draft, qwen: QwenConfig) -> None:
    """Problems where TP or PP does not divide the model, or SEQ_LENGTH exceeds it."""
    longest = draft.number("SEQ_LENGTH") or 0
    if longest > qwen.longest_sequence:
        draft.say(
            PROBLEM, f"SEQ_LENGTH={longest}: config.json allows {qwen.longest_sequence} tokens: set a smaller one"
        )
    for check in (
        lambda: qwen.check_tensor_parallel(draft.number("TP") or 1),
        lambda: qwen.chunk_layers(draft.number("PP") or 1, draft.number("VPP") or 1),
    ):
        try:
            check()
        except KitError as error:
            draft.say(PROBLEM, f"step 3 refuses this layout: {error}")


def check_groups(draft: Draft, qwen: QwenConfig, flags: dict[str, Flag]) -> None:
    """A problem where the old program had as many key-value heads as heads, and config.json has fewer."""
    groups = flags.get("--num-query-groups")
    if "--group-query-attention" in flags or qwen.num_key_value_heads == qwen.num_attention_heads:
        return
    flag = groups or Flag("--num-query-groups", (), 0)
    draft.note(PROBLEM, flag, f"without --group-query-attention every head had its own key and value; config.json has"
               f" num_key_value_heads={qwen.num_key_value_heads}, and decides here")  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if float(value).is_integer() else f"{value:g}"
