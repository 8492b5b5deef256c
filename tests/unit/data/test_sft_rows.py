"""What a fine-tuning row may hold beside its turns: the weight of each in the loss, and tools."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.encoders.encoded import BAD_ROWS, EncodedChunk
from common.data.encoders.sft import SftEncoder
from common.data.sources.bad_rows import BadRowError
from common.data.sources.chunks import Chunk
from common.data.templates.chat_template import ChatTemplate
from common.data.templates.row_formats import is_weighted, to_conversation
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError

# Of the form of Qwen2.5's: tools in a system turn, calls as JSON between tags.
TEMPLATE = (
    "{%- if tools -%}{{- '<|im_start|>system\\nTools:' -}}{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' + message.content -}}"
    "{%- for call in message.tool_calls or [] -%}{%- set function = call.function or call -%}"
    "{{- '\\n<tool_call>\\n' + ({'name': function.name, 'arguments': function.arguments} | tojson) -}}"
    "{{- '\\n</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL_TALK = [
    {"role": "user", "content": "How is Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "It is 12."},
]
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.fixture(scope="module")
def tools(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder with a template that knows tools."""
    folder = tmp_path_factory.mktemp("tools") / "hf"
    shutil.copytree(qwen, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


def encoder(folder: Path, **settings: Any) -> SftEncoder:
    tokenizer = load_tokenizer(folder)
    values = {
        "loss_on": "answer",
        "loss_turns": "all",
        "eod": None,
        "format": "messages",
        "roles": "system",
        **settings,
    }
    return SftEncoder(tokenizer, ChatTemplate(tokenizer), **values)


def encode(made: SftEncoder, *rows: dict[str, Any], path: Path = Path("a")) -> EncodedChunk:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if path != Path("a"):
        path.write_bytes(data)
    return made(Chunk(path, 0, data, len(data)))


def learned(made: SftEncoder, encoded: EncodedChunk) -> list[tuple[str, float]]:
    """(text, weight) of each run of equal weights above 0."""
    tokens, mask = encoded.streams["tokens"], encoded.streams["loss_mask"]
    cuts = np.flatnonzero(np.diff(mask)) + 1
    runs = zip(np.split(tokens, cuts), np.split(mask, cuts), strict=True)
    return [(made.tokenizer.decode(ids.tolist()), float(part[0])) for ids, part in runs if part[0]]


def with_losses(*losses: Any) -> dict[str, Any]:
    answers = iter(losses)
    turns = [dict(turn) for turn in TALK]
    for turn in turns:
        if turn["role"] == "assistant" and (loss := next(answers)) != "none":
            turn["loss"] = loss
    return {"messages": turns}


@pytest.mark.parametrize(
    ("losses", "loss_turns", "expected"),
    [
        (("none", "none"), "all", [("b<|im_end|>", 1), ("d<|im_end|>", 1)]),
        ((False, "none"), "all", [("d<|im_end|>", 1)]),
        ((True, False), "all", [("b<|im_end|>", 1)]),
        ((True, "none"), "last", [("b<|im_end|>", 1), ("d<|im_end|>", 1)]),
        ((None, 1), "last", [("d<|im_end|>", 1)]),
        ((0, 1.0), "all", [("d<|im_end|>", 1)]),
    ],
)
def test_a_turn_may_set_whether_it_is_trained_on(
    tools: Path, losses: tuple[Any, ...], loss_turns: str, expected: list[tuple[str, float]]
) -> None:
    made = encoder(tools, loss_turns=loss_turns)
    encoded = encode(made, with_losses(*losses))
    assert learned(made, encoded) == expected and encoded.streams["loss_mask"].dtype == np.uint8


def test_a_weight_is_the_masks_own_in_float32(tools: Path) -> None:
    made = encoder(tools, weighted=True)
    encoded = encode(made, with_losses(0.25, "none"), with_losses(2, False))
    assert encoded.streams["loss_mask"].dtype == np.float32
    assert learned(made, encoded) == [("b<|im_end|>", 0.25), ("d<|im_end|>", 1), ("b<|im_end|>", 2)]
    assert encoded.counts["supervised"] == np.count_nonzero(encoded.streams["loss_mask"])


def test_a_weight_without_loss_weights_is_an_error(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"a\.jsonl, line 2: its field 'loss' is a weight.*set LOSS_WEIGHTS=true"):
        encode(encoder(tools), with_losses(True, True), with_losses(0.5, True), path=tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (with_losses(-1, True), "turn 2: field 'loss' is -1: give true, false or a non-negative weight"),
        (with_losses("yes", True), "turn 2: field 'loss' is 'yes'"),
        (with_losses(float("inf"), True), "turn 2: field 'loss' is inf"),
        (with_losses(False, 0), "its fields 'loss' exclude every assistant turn"),
        ({"messages": [{**TALK[0], "loss": True}, TALK[1]]}, "turn 1: field 'loss' is True, but only assistant turns"),
        ({"messages": [*TALK], "tools": "no JSON"}, "field 'tools' is a string that is not JSON"),
        ({"messages": [*TALK], "tools": {"name": "a"}}, "field 'tools' is not a list of .*objects"),
        (
            {"messages": [{**TALK[0], "tool_calls": [CALL]}, TALK[1]]},
            "turn 1: field 'tool_calls' is only allowed in an assistant turn",
        ),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": "x"}]}, "turn 2: field 'tool_calls' is not a list"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{}]}]}, "turn 2: .* a call without a function name"),
        (
            {"messages": [TALK[0], {**TALK[1], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "turn 2: the arguments of the call to f are not JSON",
        ),
    ],
)
def test_what_is_wrong_is_reported(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        to_conversation(row, "messages", "system")


def test_the_other_formats_take_losses_and_tools_too() -> None:
    conversation = to_conversation(
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": 0.5}],
            "tools": json.dumps([TOOL]),
        },
        "conversations",
        "system",
    )
    assert conversation.losses == [None, 0.5] and conversation.tools == [TOOL] and is_weighted(conversation)
    row = {"instruction": "s", "input": "q", "output": "a", "loss": True}
    assert to_conversation(row, "instruction", "system").losses == [None, None, 1.0]


def test_tools_are_shown_as_the_template_does_and_calls_are_learned(tools: Path) -> None:
    from transformers import AutoTokenizer

    made = encoder(tools)
    encoded = encode(made, {"messages": TOOL_TALK, "tools": [TOOL]})
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    messages = [TOOL_TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}, *TOOL_TALK[2:]]
    theirs = AutoTokenizer.from_pretrained(tools).apply_chat_template(messages, tools=[TOOL], tokenize=False)
    assert made.tokenizer.decode(encoded.streams["tokens"].tolist()) == theirs
    shown = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert learned(made, encoded) == [(shown, 1), ("It is 12.<|im_end|>", 1)]
    assert encoded.counts["empty answers"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tool | tojson", "'x' | tojson"), "the chat template does not render the tool 'weather'"),
        (("'name': function.name", "'name': 'f'"), "the chat template does not render the tool calls of turn 2"),
        (("message.tool_calls or []", "[]"), "not render the tool calls"),
    ],
)
def test_a_template_that_hides_tools_is_reported(
    tools: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    shutil.copytree(tools, tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer_config.json"
    assert change[0] in TEMPLATE
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE.replace(*change)}))
    row: dict[str, Any] = {"messages": TOOL_TALK}
    if "tool 'weather'" in message:
        row["tools"] = [TOOL]
    with pytest.raises(KitError, match=message):
        encode(encoder(tmp_path / "hf"), row, path=tmp_path / "a.jsonl")


def test_chatml_shows_no_tools_and_says_so(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": None}))
    for row in ({"messages": TALK, "tools": [TOOL]}, {"messages": TOOL_TALK}):
        with pytest.raises(KitError, match="it has tools, which ChatML does not render"):
            encode(encoder(tmp_path / "hf"), row, path=tmp_path / "a.jsonl")


def test_unusable_rows_are_set_aside(tools: Path) -> None:
    made = encoder(tools, skip_bad_rows=True)
    rows = [{"messages": TALK}, {"messages": []}, {"messages": TALK}, {"text": "a"}, with_losses(0.5, True)]
    encoded = encode(made, *rows)
    assert encoded.lengths.size == 2 and encoded.counts["read"] == 5 and encoded.counts[BAD_ROWS] == 3
    assert [json.loads(reject.row) for reject in encoded.rejects] == [rows[1], rows[3], rows[4]]
    assert learned(made, encoded) == [("b<|im_end|>", 1), ("d<|im_end|>", 1)] * 2


def test_a_sample_whose_text_the_tokenizer_loses_is_a_bad_row(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder(tools, skip_bad_rows=True)
    real = made.tokenizer.decode
    monkeypatch.setattr(made.tokenizer, "decode", lambda ids: real(ids).replace("d<", "e<"))
    encoded = encode(made, {"messages": TALK}, {"messages": TALK[:2]})
    assert encoded.lengths.size == 1 and encoded.rejects[0].cause.startswith("the trained tokens decode to 'b<|im_")
    assert isinstance(encoded.counts, Counter)


def test_the_sample_for_the_engines_is_bounded_and_skips_bad_rows(tools: Path) -> None:
    from common.data.encoders.sft import sample_segments

    made = encoder(tools)
    rows = [("a", {"messages": TALK}), ("bad", {"messages": []}), ("b", {"messages": TALK}), ("c", {"messages": TALK})]
    pieces = [piece.text for piece in made.segments_of_row(rows[0][1], Counter())]
    everything = sample_segments(made, rows, 10**6)
    assert everything == [(place, text) for place in "abc" for text in pieces]
    assert sample_segments(made, rows, len("".join(pieces)) + 1) == everything[: 2 * len(pieces)]
