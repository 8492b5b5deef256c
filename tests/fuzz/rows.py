"""Mutants of fine-tuning rows: `cases(seed, number)` gives `number` cases, the same for the same seed.

A case is a line of words, how it is to be read, and below it the row, mostly as JSON.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.configs import NUMBERS, OTHERS
from tests.fuzz.pickles import byte_cases

TOOL = {"type": "function", "function": {"name": "weather", "description": "tells", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ASK, ANSWER = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}
SOURCES: list[dict[str, Any]] = [
    {"messages": [ASK, ANSWER]},
    {"messages": [{"role": "system", "content": "be brief"}, ASK, {**ANSWER, "loss": False}, ASK, ANSWER], "id": 7},
    {
        "messages": [ASK, {**ANSWER, "weight": 0.5}, ASK, {**ANSWER, "train": True}],
        "source": "web",
        "instruction": None,
    },
    {"messages": [ASK, {**ANSWER, "reasoning_content": "Two and two."}]},
    {"messages": [ASK, {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."}]},
    {
        "messages": [ASK, {**ANSWER, "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "12"}, ANSWER],
        "tools": [TOOL],
    },
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER]},
    {"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
    {"conversations": [{"from": "human", "value": "再见"}, {"from": "gpt", "value": "\n\nIt is 12."}], "system": "x"},
    {
        "conversations": [
            {"from": "human", "value": "What is 20% off 200?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
            {"from": "observation", "value": '{"price": 160}'},
            {"from": "gpt", "value": "It is 160."},
        ],
        "tools": json.dumps([TOOL["function"]]),
    },
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"instruction": "What is 2+2?", "input": "", "output": "It is 4.", "system": "be brief", "loss": 1},
]
OF_KITS = (
    "loss", "weight", "loss_scale", "train", "training", "mask", "masks", "loss_mask", "label", "labels", "weights",
    "reasoning_content", "reasoning", "thinking", "images", "image", "video", "audio", "objects", "chosen", "rejected",
    "functions", "function_call", "tool_calls", "tools", "history", "documents", "system", "system_prompt", "messages",
    "conversations", "instruction", "input", "output", "prompt", "completion", "text", "name", "tool_call_id", "role",
    "from", "content", "value", "id", "chat_template_kwargs", "enable_thinking", "prefix", "step", "eot", "kto_tag",
)  # fmt: skip
ROLES = ("system", "user", "human", "assistant", "gpt", "tool", "observation", "function_call", "developer", "User", "")
TEXTS = (
    "", " ", "\n", "\n\n", "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<think>", "</think>",
    "<tool_call>", "<think>\n\n</think>\n\n", "</think>\n\nb", "\ud83d\ude00", "\ud800", "e\u0301", "\u0301", "\0",
    "\x1b[2J", "\u2028", "\ufeff", "\ue000", "\ue0001\ue001", "[]", "{}", '{"a": NaN}', "null", '"x"', "[" * 3000,
    '{"a":' * 500 + "1" + "}" * 500, "{{ 1/0 }}", "{% raw %}", "<image>", "\r\n", "\u00a0", "\u3000", "\ufdfa",
    "a" * 20_000, "\U0010ffff", "\ufffe", "9" * 5000,
)  # fmt: skip
VALUES = (*NUMBERS, *OTHERS, 1e39, 3.5e38, 1e-39, 1e-50, -0.5, 0.25, ASK, ANSWER, [ASK], [CALL], [TOOL], TOOL)
TEMPLATES, WAYS = ("qwen2.5", "qwen3"), ("all answer", "last answer", "all turn", "last turn")


def cases(seed: int, count: int) -> Iterator[bytes]:
    """Rows of the three formats, of whose values one to some are changed; or whose bytes are."""
    rng = random.Random(seed)
    for _ in range(count):
        row = copy.deepcopy(rng.choice(SOURCES))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 4))):
            change(rng, row)
        text = _written(rng, row)
        if rng.random() < 0.1:
            text = next(byte_cases(rng.randrange(1 << 30), 1, text))
        how = (rng.choice(TEMPLATES), rng.choice(WAYS), rng.choice(("whole", "weighted")))
        roles = rng.choice(("system", "alpaca"))
        yield " ".join((*how, roles)).encode() + b"\n" + text


def _written(rng: random.Random, row: dict[str, Any]) -> bytes:
    """As JSON, only ASCII or not; now and then with a duplicate key, or a deeply nested value."""
    text = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.03:
        depth = rng.choice((400, 900, 1100, 50_000))
        text = text.replace(rng.choice(('"It is 4."', '"Paris"', '"user"', "null")), "[" * depth + "]" * depth, 1)
    if rng.random() < 0.03:
        name, value = json.dumps(rng.choice(OF_KITS)), json.dumps(rng.choice(VALUES))
        text = rng.choice((f"{{{name}: {value}, {text[1:]}", f"{text[:-1]}, {name}: {value}}}"))
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every nested value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def change(rng: random.Random, row: dict[str, Any]) -> None:
    """Changes one place in `row`; deeper places are rarer."""
    places = list(_places(row))
    if not places or rng.random() < 0.15:
        return _put_in(rng, row)
    inside, key = rng.choice(places)
    old = inside[key]
    if rng.random() < 0.3 and isinstance(old, dict):
        return _put_in(rng, old)
    change: list[Callable[[], Any]] = [
        lambda: inside.__setitem__(key, copy.deepcopy(rng.choice(VALUES))),
        lambda: inside.__setitem__(key, copy.deepcopy(rng.choice(VALUES))),
        lambda: inside.__delitem__(key),
        lambda: inside.__setitem__(key, None),
        lambda: inside.__setitem__(key, rng.choice(([old], {"a": old}, json.dumps(old), [[old]] * 2))),
        lambda: inside.__setitem__(key, _nested(old, rng.choice((5, 60, 90)))),
    ]
    if isinstance(old, str):
        change += [lambda: inside.__setitem__(key, _spliced(rng, old))] * 5
    if key in ("role", "from"):
        change += [lambda: inside.__setitem__(key, rng.choice(ROLES))] * 6
    if isinstance(inside, list):
        change += [lambda: inside.insert(rng.randrange(len(inside) + 1), copy.deepcopy(old))] * 2
        change += [lambda: rng.shuffle(inside), lambda: inside.extend(copy.deepcopy(inside) * 20)]
    rng.choice(change)()
    return None


def _put_in(rng: random.Random, value: dict[str, Any]) -> None:
    texts = (*TEXTS, "x", "Two and two.")
    value[rng.choice(OF_KITS)] = copy.deepcopy(rng.choice(VALUES if rng.random() < 0.7 else texts))


def _spliced(rng: random.Random, text: str) -> str:
    at = rng.choice((0, len(text), rng.randrange(len(text) + 1)))
    return text[:at] + rng.choice(TEXTS) + text[at + rng.choice((0, 0, 1, 3)) :]


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value
