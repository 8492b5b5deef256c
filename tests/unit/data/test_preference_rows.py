"""Preference rows: every shape that is taken gives the same pair, and what is no pair is named."""

from typing import Any

import numpy as np
import pytest

from common.data.encoders.preference import check_same_prompt
from common.data.sources.bad_rows import BadRowError
from common.data.templates.preference_rows import to_pair
from common.data.templates.row_formats import check_format, detect_format, to_conversation

USER, GOOD, BAD = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": "5"},
)
SYSTEM = {"role": "system", "content": "Be brief."}
TEXTS = {"chosen": "4", "rejected": "5"}
SHAREGPT = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "2+2?", **TEXTS},
    "explicit prompt": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt as text": {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
    "turns and texts": {"prompt": [USER], **TEXTS},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "LLaMA-Factory, sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}], **SHAREGPT},
    "LLaMA-Factory, openai": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "instruction": {"instruction": "", "input": "2+2?", **TEXTS},
    "null columns": {"prompt": "2+2?", **TEXTS, "messages": None, "instruction": None, "output": None},
    "repeated prompt": {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    "repeated turns": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
}  # fmt: skip
WITH_SYSTEM: dict[str, dict[str, Any]] = {
    "texts": {"system": "Be brief.", "prompt": "2+2?", **TEXTS},
    "implicit prompt": {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    "sharegpt": {"system": "Be brief.", "conversations": [USER], **SHAREGPT},
    "instruction": {"instruction": "Be brief.", "input": "2+2?", **TEXTS},
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_same_pair(name: str) -> None:
    row = SHAPES[name]
    assert detect_format(row) == "preference"
    pair = to_pair(row, "system")
    assert pair.chosen.messages == [USER, GOOD]
    assert pair.rejected.messages == [USER, BAD]


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_the_system_turn_comes_before_the_prompt(name: str) -> None:
    pair = to_pair(WITH_SYSTEM[name], "system")
    assert pair.chosen.messages == [SYSTEM, USER, GOOD] and pair.rejected.messages == [SYSTEM, USER, BAD]


def test_an_instruction_is_the_users_with_alpacas_roles() -> None:
    pair = to_pair({"instruction": "Add.", "input": "2+2?", "system": "Be brief.", **TEXTS}, "alpaca")
    assert pair.chosen.messages == [SYSTEM, {"role": "user", "content": "Add.\n2+2?"}, GOOD]


def test_only_the_last_of_several_turns_may_differ() -> None:
    talk = [USER, GOOD, {"role": "user", "content": "Why?"}]
    last = [{"role": "assistant", "content": text} for text in ("So.", "No.")]
    pair = to_pair({"chosen": [*talk, last[0]], "rejected": [*talk, last[1]]}, "system")
    assert pair.chosen.messages == [*talk, last[0]] and pair.rejected.messages[-1] == last[1]
    with pytest.raises(BadRowError, match="differ before their last turn"):
        to_pair({"chosen": [*talk, last[0]], "rejected": [USER, BAD, talk[2], last[1]]}, "system")


def test_tools_and_unused_fields_are_those_of_other_rows() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    pair = to_pair({**SHAPES["texts"], "tools": [tool], "score_chosen": 9}, "system")
    assert pair.chosen.tools == pair.rejected.tools == [tool]
    assert pair.chosen.notes == ["rows' field 'score_chosen', not used"]


OTHER = {"role": "user", "content": "3+3?"}
REFUSED: dict[str, dict[str, Any]] = {
    "answers are equal": {"prompt": "a", "chosen": "4", "rejected": "4"},
    "differ before their last turn": {"chosen": [USER, GOOD], "rejected": [OTHER, BAD]},
    "answers without a prompt": TEXTS,
    "a prompt in 'prompt' and 'messages'": {"prompt": "a", "messages": [USER], **TEXTS},
    "begins with its prompt and the other does not": {"prompt": "a", "chosen": [USER, GOOD], "rejected": [BAD]},
    "field 'prompt' is not in them": {"prompt": "3+3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "field 'messages' is not in them": {"messages": [OTHER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "chosen: it has no assistant turn": {"chosen": [USER, USER], "rejected": [USER, BAD]},
    "chosen: it ends with a turn of user": {"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]},
    "rejected: turn 1: field 'content' holds a JSON number": {
        "prompt": "2+2?", "chosen": "4", "rejected": [{"role": "assistant", "content": 5}],
    },
    "field 'chosen' is not a text, a turn or a list": {"prompt": "a", "chosen": 4, "rejected": "5"},
    "field 'prompt' is not a list of turns or a text": {"prompt": 4, **TEXTS},
    "a turn's loss is set": {"prompt": "a", "chosen": [{**GOOD, "loss": 1}], "rejected": [BAD]},
    "field 'label' is a preference": {"prompt": "a", **TEXTS, "label": True},
    "field 'images' is not supported": {"prompt": "a", **TEXTS, "images": ["x.png"]},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_pair_is_named(message: str) -> None:
    with pytest.raises(BadRowError) as caught:
        to_pair(REFUSED[message], "system")
    assert message in str(caught.value)


def test_prompts_that_a_template_renders_differently_are_refused() -> None:
    chosen, rejected = (
        (np.array([1, 2, 3, 7]), np.array([0, 0, 0, 1])),
        (np.array([1, 2, 3, 8, 9]), np.array([0] * 3 + [1] * 2)),
    )
    check_same_prompt(chosen, rejected)
    other = (np.array([1, 5, 3, 8, 9]), rejected[1])
    longer = (np.array([1, 2, 3, 3, 8]), np.array([0] * 4 + [1]))
    for each in (other, longer):
        with pytest.raises(BadRowError, match="renders the prompt differently before its two answers"):
            check_same_prompt(chosen, each)
    with pytest.raises(BadRowError, match="equal as tokens"):
        check_same_prompt(chosen, chosen)


def test_formats_do_not_mix_and_a_preference_is_no_conversation() -> None:
    conversation = {"messages": [USER, GOOD]}
    with pytest.raises(BadRowError, match="of format messages, the first row of preference"):
        check_format(conversation, "preference")
    with pytest.raises(BadRowError, match="of format preference, the first row of messages"):
        check_format(SHAPES["implicit prompt"] | {"messages": [USER]}, "messages")
    with pytest.raises(BadRowError, match="it is a preference"):
        to_conversation(SHAPES["texts"], "preference", "system")
    with pytest.raises(BadRowError, match="'chosen' is a preference"):
        to_conversation({**conversation, "chosen": "4"}, detect_format({**conversation, "chosen": "4"}), "system")
