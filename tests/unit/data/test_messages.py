import json
from collections import Counter
from typing import Any

import pytest

from common.data.sources.bad_rows import BadRowError
from common.data.templates.messages import parse_turn
from common.data.templates.row_formats import Conversation, check_format, detect_format, to_conversation

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}


def conversation(*turns: Any, **fields: Any) -> Conversation:
    return to_conversation({"messages": list(turns), **fields}, "messages", "system")


def answer(**fields: Any) -> Conversation:
    return conversation(USER, {**ANSWER, **fields})


@pytest.mark.parametrize("who", ["gpt", "chatgpt", "bing", "bard", "model", "assistant"])
@pytest.mark.parametrize("kind", ["messages", "conversations"])
def test_both_formats_names_are_read_in_either_list(who: str, kind: str) -> None:
    expected = [USER, ANSWER]
    for turns in (
        [{"from": "human", "value": "q"}, {"from": who, "value": "a"}],
        [{"role": "human", "content": "q"}, {"role": who, "content": "a"}],
        [{"from": "user", "value": "q", "role": None, "content": None}, {"role": who, "content": "a", "from": None}],
    ):
        assert to_conversation({kind: turns}, kind, "system").messages == expected


def test_a_turn_of_two_words_is_refused() -> None:
    for two in ({"from": "gpt"}, {"value": "b"}):
        with pytest.raises(BadRowError, match="turn 2: it has the fields .* which mean the same: keep one"):
            answer(**two)


@pytest.mark.parametrize("field", ["train", "training"])
def test_train_is_followed(field: str) -> None:
    assert answer(**{field: True}).losses == [None, 1.0]
    several = conversation(USER, {**ANSWER, field: False}, {**USER, field: False}, ANSWER)
    assert several.losses == [None, 0.0, 0.0, None]
    assert answer(**{field: None}).losses == [None, None]
    for wrong in ("false", 0.5, -1, [], {}):
        with pytest.raises(BadRowError, match=f"turn 2: field '{field}' is .*: give true or false"):
            answer(**{field: wrong})
    with pytest.raises(BadRowError, match=f"turn 1: field '{field}' is True, but only assistant turns"):
        conversation({**USER, field: True}, ANSWER)


@pytest.mark.parametrize("field", ["loss", "weight", "loss_scale"])
def test_weights_are_what_a_float32_holds(field: str) -> None:
    for good in (0.5, 1, 3.4e38, 1.2e-38, True):
        assert answer(**{field: good}).losses == [None, float(good)]
    for wrong in (1e39, 10**400, 10**5000, -1e-9, float("nan"), float("inf"), 1e-50, 1e-40, "1", [1]):
        with pytest.raises(BadRowError, match=f"turn 2: field '{field}' is "):
            answer(**{field: wrong})


def test_two_fields_of_a_loss_are_refused() -> None:
    with pytest.raises(BadRowError, match="turn 2: it has the fields 'loss' and 'train'"):
        answer(loss=1, train=True)


@pytest.mark.parametrize("field", ["mask", "images", "audio", "function_call", "refusal", "content_blocks", "train_on"])
def test_other_fields_of_a_turn_are_refused_by_name(field: str) -> None:
    with pytest.raises(BadRowError, match=f"turn 2: field '{field}' "):
        answer(**{field: [1]})
    for nothing in (None, [], "", {}):
        assert answer(**{field: nothing}).messages == [USER, ANSWER]
    if field not in ("images", "audio"):
        with pytest.raises(BadRowError, match=f"turn 2: field '{field}' "):
            answer(**{field: False})


def test_metadata_is_counted_and_what_templates_use_is_passed_on() -> None:
    made = conversation(
        {**USER, "timestamp": 1, "name": "ann"}, {**ANSWER, "timestamp": 2, "name": ""}, source="x", score=0
    )
    assert made.messages == [{**USER, "name": "ann"}, ANSWER]
    assert Counter(made.notes) == {
        "turns' field 'timestamp', not used": 2,
        "rows' field 'source', not used": 1,
        "rows' field 'score', not used": 1,
    }


@pytest.mark.parametrize(
    "field",
    ["images", "videos", "audios", "audio", "objects", "loss", "weight", "mask", "train", "chosen", "rejected", "label"]
    + ["history", "functions", "documents", "system_prompt", "reasoning_content", "thinking", "loss_mask"],
)
@pytest.mark.parametrize("kind", ["messages", "instruction"])
def test_fields_of_a_row_about_training_are_refused_by_name(field: str, kind: str) -> None:
    row = {"messages": [USER, ANSWER]} if kind == "messages" else {"input": "q", "output": "a"}
    assert to_conversation({**row, field: None}, kind, "system").messages == [USER, ANSWER]
    if (kind, field) == ("instruction", "loss"):
        assert to_conversation({**row, "loss": 2}, kind, "system").losses == [None, 2.0]
        return
    with pytest.raises(BadRowError, match=f"field '{field}' is"):
        to_conversation({**row, field: "x"}, kind, "system")


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]
    assert parse_turn({"role": "user", "content": parts}).message["content"] == "ab"
    for part, message in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "a part of type 'image_url'"),
        ({"type": "thinking", "thinking": "x"}, "a part of type 'thinking'"),
        ({"type": "text", "text": "x", "cache_control": {"type": "y"}}, "a part with the field 'cache_control'"),
        ({"text": "x"}, "a part of type 'None'"),
        ({"type": "text"}, "no field 'text'"),
        ("x", "an array with a string|a JSON array with a string"),
    ):
        with pytest.raises(BadRowError, match=message):
            parse_turn({"role": "user", "content": [*parts, part]})


@pytest.mark.parametrize("value", [CALL, [CALL], json.dumps(CALL), json.dumps([CALL])])
def test_function_call_is_the_assistants_call(value: Any) -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]}
    made = to_conversation(row, "conversations", "system").messages[1]
    assert made == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("f(1)", "the function_call turn is a string that is not JSON"),
        ("[]", "holds no call"),
        (None, "holds no call"),
        ("3", "is not a list of .*objects"),
        ('{"arguments": {}}', "a call without a function name"),
        ('{"name": "f"}', "the arguments of the call to f are not a JSON object: write {}"),
        ('{"name": "f", "arguments": "{\\"a\\": NaN}"}', "the call to f: a number is nan, which is not JSON"),
        ('{"name": "f", "arguments": {"a": [{"b": -1e400}]}}', "the call to f: a number is -inf"),
        ("[" * 100_000, "nested too deeply"),
        ('{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}", "function_call turn is a string that is not JSON"),
    ],
)
def test_calls_that_are_none_are_reported(value: Any, message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        parse_turn({"from": "function_call", "value": value})


@pytest.mark.parametrize("function", [None, "name", [], {}, {"name": None}, {"name": ""}, {"name": "a\x1b[2J"}])
def test_tools_without_a_name_are_reported(function: Any) -> None:
    with pytest.raises(BadRowError, match="field 'tools': tool 2 has no function name"):
        conversation(USER, ANSWER, tools=[{"name": "f"}, {"type": "function", "function": function}])


def test_nulls_of_tables_are_absent_in_tools_and_calls() -> None:
    made = conversation(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": None, "function": {**CALL, "strict": None}}]},
        tools=['{"name": "f", "function": null}'],
    )
    assert made.tools == [{"name": "f"}]
    assert made.messages[1]["tool_calls"] == [{"function": CALL}]


def test_the_templates_own_settings() -> None:
    given = {"enable_thinking": False, "python_tools": None}
    for kwargs in (given, json.dumps(given)):
        assert conversation(USER, ANSWER, chat_template_kwargs=kwargs).template_kwargs == {"enable_thinking": False}
    assert conversation(USER, ANSWER, chat_template_kwargs={}).template_kwargs == {}
    for wrong in ([1], "no JSON", True, {"a": float("nan")}):
        with pytest.raises(BadRowError, match="field 'chat_template_kwargs'"):
            conversation(USER, ANSWER, chat_template_kwargs=wrong)


def test_reasoning_is_passed_on_under_one_name() -> None:
    for field in ("reasoning_content", "reasoning", "thinking"):
        made = answer(**{field: "r"})
        assert made.messages[1] == {**ANSWER, "reasoning_content": "r"} and made.reasoning == {1: field}
    both = answer(reasoning="r", reasoning_content="r", thinking="")
    assert both.messages[1]["reasoning_content"] == "r"
    assert answer(reasoning_content="").messages == [USER, ANSWER]
    with pytest.raises(BadRowError, match="turn 2: its fields 'reasoning' and 'thinking' differ"):
        answer(reasoning="r", thinking="s")
    with pytest.raises(BadRowError, match="turn 1: field 'thinking' is only allowed in an assistant turn"):
        conversation({**USER, "thinking": "r"}, ANSWER)
    with pytest.raises(BadRowError, match="field 'reasoning' holds a JSON array"):
        answer(reasoning=["r"])


def test_null_columns_are_absent_and_a_joined_table_may_hold_two_formats() -> None:
    assert detect_format({"messages": [], "instruction": None, "input": None, "output": None}) == "messages"
    assert detect_format({"messages": None, "conversations": None, "input": "", "output": ""}) == "instruction"
    with pytest.raises(BadRowError, match="match no known format"):
        detect_format({"messages": None, "instruction": None})
    assert check_format({"messages": [], "instruction": None, "output": None}, "instruction") == "messages"
    for row in ({"messages": []}, {"messages": [], "input": "x", "instruction": None}):
        with pytest.raises(BadRowError, match="it is of format messages, the first row of instruction"):
            check_format(row, "instruction")
