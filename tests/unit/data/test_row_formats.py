from typing import Any

import pytest

from common.data.sources.bad_rows import BadRowError
from common.data.templates.row_formats import detect_format, to_messages

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_instruction_is_the_systems_turn_and_none_when_empty() -> None:
    row = {"instruction": "be brief", "input": "q", "output": "a"}
    assert to_messages(row, "instruction", "system") == [{"role": "system", "content": "be brief"}, USER, ANSWER]
    for empty in ({"instruction": ""}, {"instruction": None}, {}):
        assert to_messages({**empty, "input": "q", "output": "a"}, "instruction", "system") == [USER, ANSWER]


def test_alpaca_joins_instruction_and_input_with_a_newline() -> None:
    def user(row: dict[str, Any]) -> list[str]:
        return [m["content"] for m in to_messages({**row, "output": "a"}, "instruction", "alpaca")]

    assert user({"instruction": "add", "input": "1 2"}) == ["add\n1 2", "a"]
    assert user({"instruction": "add", "input": ""}) == user({"instruction": "add"}) == ["add", "a"]
    assert user({"instruction": "add", "system": "s"}) == ["s", "add", "a"]


def test_lists_of_turns() -> None:
    row = turns(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a"))
    assert to_messages(row, "messages", "system") == row["messages"]
    pairs = [("human", "q"), ("gpt", "a"), ("observation", "o"), ("assistant", "a")]
    row = {"conversations": [{"from": who, "value": value} for who, value in pairs], "system": "s"}
    assert [(m["role"], m["content"]) for m in to_messages(row, "conversations", "system")] == [
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "o"), ("assistant", "a"),
    ]  # fmt: skip


def test_formats_are_recognized_by_their_fields() -> None:
    assert detect_format({"instruction": "", "output": ""}) == "instruction"
    assert detect_format({"input": "", "output": ""}) == "instruction"
    assert detect_format({"messages": [], "id": 1}) == "messages"
    assert detect_format({"conversations": []}) == "conversations"
    with pytest.raises(BadRowError, match="'text', 'id' match no known format"):
        detect_format({"text": "a", "id": 1})
    with pytest.raises(BadRowError, match="instruction and messages: set FORMAT"):
        detect_format({"messages": [], "instruction": ""})


@pytest.mark.parametrize(
    ("row", "kind", "roles", "message"),
    [
        ({"instruction": "i", "input": "q"}, "instruction", "system", "no field 'output'"),
        (
            {"instruction": "i", "input": "q", "output": 1},
            "instruction",
            "system",
            "field 'output' holds a JSON number",
        ),
        (
            {"instruction": ["i"], "input": "q", "output": "a"},
            "instruction",
            "system",
            "'instruction' holds a JSON array",
        ),
        ({"instruction": "i", "input": "", "output": "a"}, "instruction", "system", "set ROLES=alpaca"),
        ({"input": "q", "output": "a", "system": "s"}, "instruction", "system", "'system' conflicts with ROLES=system"),
        ({"instruction": "", "input": "q", "output": "a"}, "instruction", "alpaca", "field 'instruction' is empty"),
        (
            {"instruction": "i", "input": "q", "output": "a", "history": [["q", "a"]]},
            "instruction",
            "system",
            "history",
        ),
        ({}, "messages", "system", "field 'messages' is not a list of turns"),
        ({"messages": []}, "messages", "system", "field 'messages' is not a list of turns"),
        ({"messages": ["q"]}, "messages", "system", "messages: turn 1: it is not an object"),
        (turns(("user", None), ("assistant", "a")), "messages", "system", "turn 1: field 'content' holds a JSON null"),
        (turns(("user", "q"), ("bot", "a")), "messages", "system", "turn 2: role 'bot' is not one of"),
        (turns(("user", "q"), ("system", "s")), "messages", "system", "no assistant turn"),
        (
            turns(("user", "q"), ("system", "s"), ("assistant", "a")),
            "messages",
            "system",
            "system turn is only allowed as the first",
        ),
        (turns(("assistant", "a"), ("user", "q")), "messages", "system", "begins with an assistant turn"),
        (
            {**turns(("user", "q"), ("assistant", "a")), "functions": [{}]},
            "messages",
            "system",
            "field 'functions' is not supported",
        ),
        (
            {"messages": [{**USER, "weight": 1}, ANSWER]},
            "messages",
            "system",
            "turn 1: field 'weight' is 1, but",
        ),
        ({"conversations": [{"from": "human"}]}, "conversations", "system", "turn 1: it has no field 'value'"),
    ],
)
def test_wrong_rows_are_reported_by_field(row: dict[str, Any], kind: str, roles: str, message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        to_messages(row, kind, roles)
