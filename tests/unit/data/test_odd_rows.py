"""One odd row is one bad row, and what a template does not show is reported."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.encoders.encoded import BAD_ROWS, EncodedChunk
from common.data.encoders.pretrain import PretrainEncoder
from common.data.encoders.sft import SftEncoder
from common.data.preprocessing.merging import notes_of
from common.data.sources.bad_rows import BadRowError, BadRows, ignore_bad_row, to_bad_row_error
from common.data.sources.chunks import Chunk
from common.data.templates.chat_template import ChatTemplate
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError

# Of the form of those that show reasoning in answers after the last question; one call's field is joined as text.
TEMPLATE = (
    "{%- set last = namespace(user=-1) -%}"
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for tool in tools or [] -%}{{- tool | tojson -}}{%- endfor -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.reasoning_content and SHOWN -%}"
    "{{- '<think>' + message.reasoning_content.strip() + '</think>' -}}{%- endif -%}"
    "{{- message.content -}}"
    "{%- for call in message.tool_calls or [] -%}{{- '<tool_call>' + call.name + (call.arguments | tojson) -}}"
    "{%- if call.name == 'joined' -%}{{- '' + call.count -}}{%- endif -%}{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LAST, ALL, NONE = "loop.index0 > last.user", "true", "false"
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "It is 4."}
GOOD = {"messages": [USER, ANSWER]}


@pytest.fixture
def made(qwen: Path, tmp_path: Path) -> Callable[..., SftEncoder]:
    """An encoder of TEMPLATE with SHOWN, and other settings."""

    def make(shown: str = LAST, **settings: Any) -> SftEncoder:
        folder = tmp_path / f"hf{len(list(tmp_path.iterdir()))}"
        shutil.copytree(qwen, folder)
        path = folder / "tokenizer_config.json"
        template = TEMPLATE.replace("SHOWN", shown)
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        tokenizer = load_tokenizer(folder)
        values = {"format": "messages", "roles": "system", "loss_on": "answer", "loss_turns": "all", "eod": None}
        return SftEncoder(tokenizer, ChatTemplate(tokenizer), **{**values, **settings})

    return make


def encode(encoder: SftEncoder, path: Path, *rows: Any) -> EncodedChunk:
    texts = (row if isinstance(row, str) else re.sub(r'"@(\d+)@"', _nested, json.dumps(row)) for row in rows)
    data = b"".join(text.encode() + b"\n" for text in texts)
    path.write_bytes(data)
    return encoder(Chunk(path, 0, data, len(data)))


def calling(**call: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def deep(levels: int) -> str:
    """What `encode` writes, as nested objects: json.dumps hits the recursion limit under pytest's own stack."""
    return f"@{levels}@"


def _nested(found: re.Match[str]) -> str:
    return '{"a": ' * int(found[1]) + "1" + "}" * int(found[1])


def answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ANSWER, **fields}]}


DEEP = '{"a":' * 5000 + "1" + "}" * 5000
ODD = {
    "a template's TypeError": (calling(name="joined", count=3, arguments={}), "TypeError: "),
    "deep arguments": (calling(name="f", arguments=deep(900)), "nested too deeply|RecursionError"),
    "deep arguments in a string": (
        calling(name="f", arguments=DEEP),
        "nested too deeply|RecursionError",  # from Python 3.13 on json reads them, and the template fails
    ),
    "a tool's parameters": (
        {**GOOD, "tools": f'[{{"name": "f", "parameters": {DEEP}}}]'},
        "nested too deeply|RecursionError",
    ),
    "half a pair": (calling(name="f", arguments='{"a": "\\ud800"}'), "half of a surrogate pair"),
    "half a pair as a key": (calling(name="f", arguments='{"\\udc00": 1}'), "half of a surrogate pair"),
    "half a pair in a tool": ({**GOOD, "tools": '[{"name": "f", "d": "\\ud800"}]'}, "half of a surrogate pair"),
    "a tool without a function": ({**GOOD, "tools": [{"type": "function", "function": None}]}, "'tools': tool 1"),
    "a number of 5,000 digits": (
        calling(name="f", arguments='{"a": ' + "1" * 5000 + "}"),
        "arguments of the call to f",
    ),
    "a loss of 401 digits": (answer(loss=10**400), "field 'loss' is a number of more than 64 bits"),
    "a loss that is infinite as float32": (answer(loss=1e39), "field 'loss' is 1e\\+39"),
    "a loss that is 0 as float32": (answer(loss=1e-50), "too small for a float32"),
    "no number": ('{"messages": [{"role": "assistant", "content": "a", "loss": NaN}]}', "field 'loss' is nan"),
    "a role that is no string": ({"messages": [{"role": {}, "content": ""}]}, "field 'role' holds a JSON object"),
    "turns within turns": ({"messages": [[USER], ANSWER]}, "turn 1: it is not an object"),
    "settings that are no object": ({**GOOD, "chat_template_kwargs": [1]}, "'chat_template_kwargs' is not an object"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_row_is_one_bad_row(name: str, made: Callable[..., SftEncoder], tmp_path: Path) -> None:
    row, message = ODD[name]
    encoded = encode(made(skip_bad_rows=True, weighted=True), tmp_path / "a.jsonl", GOOD, row, GOOD)
    assert [reject.cause for reject in encoded.rejects if re.search(message, reject.cause)], encoded.rejects
    assert encoded.lengths.size == 2 and encoded.counts[BAD_ROWS] == 1 and encoded.counts["read"] == 3
    assert np.isfinite(encoded.streams["loss_mask"]).all()


def test_the_first_bad_row_names_on_error_once(made: Callable[..., SftEncoder], tmp_path: Path) -> None:
    rows = [GOOD, {"messages": [ANSWER]}, {"messages": []}]
    with pytest.raises(KitError, match=r"a\.jsonl, line 2: it begins with .* \(ON_ERROR=skip leaves") as stopped:
        encode(made(), tmp_path / "a.jsonl", *rows)
    assert str(stopped.value).count("ON_ERROR") == 1
    kept = encode(made(skip_bad_rows=True), tmp_path / "a.jsonl", *rows)
    assert not any("ON_ERROR" in reject.cause for reject in kept.rejects) and len(kept.rejects) == 2
    chunk = Chunk(tmp_path / "a.jsonl", 0, b"{}\n", 3)
    with pytest.raises(KitError) as elsewhere:
        BadRows(chunk).add(0, BadRowError("x"))
    assert str(elsewhere.value).endswith("line 1: x")


def test_errors_that_are_not_a_rows_fault_are_raised(tmp_path: Path) -> None:
    bad = BadRows(Chunk(tmp_path / "a", 0, b"{}\n", 3), skip=True)
    for error in (KitError("x"), MemoryError(), KeyboardInterrupt(), SystemExit(1)):
        for net in (ignore_bad_row, lambda: bad.row(0)):
            with pytest.raises(type(error)), net():
                raise error
    for odd in (TypeError("x"), RecursionError(), OverflowError("x"), AttributeError("x"), AssertionError()):
        with ignore_bad_row():
            raise odd
        with bad.row(0):
            raise odd
        cause = r"TypeError: x \(test_odd_rows.py, line|nested|cannot be used"
        assert isinstance(to_bad_row_error(odd), BadRowError) and re.search(cause, bad.rows[-1].cause)
    assert len(bad.rows) == 5


def test_pretraining_has_the_same_handling_of_errors(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(qwen)
    data = b'{"text": "a"}\n{"txt": "b"}\n{"text": "odd"}\n'
    real = type(tokenizer).count_special
    monkeypatch.setattr(type(tokenizer), "count_special", lambda self, text: 1 // (text != "odd") and real(self, text))
    encoded = PretrainEncoder(tokenizer, "text", None, skip_bad_rows=True)(Chunk(tmp_path / "a", 0, data, len(data)))
    assert [reject.cause.split(" (")[0] for reject in encoded.rejects] == [
        "it has no field 'text'; its fields are 'txt'",
        "it cannot be used: ZeroDivisionError: integer division or modulo by zero",
    ]
    assert encoded.lengths.size == 1


def test_a_row_that_leaves_nothing_to_learn_is_reported(made: Callable[..., SftEncoder], tmp_path: Path) -> None:
    rows = {"messages": [USER, ANSWER, USER, {**ANSWER, "train": False}]}
    assert encode(made(), tmp_path / "a.jsonl", rows).counts["supervised"]
    with pytest.raises(KitError, match="there is nothing to train on: LOSS_TURNS=last"):
        encode(made(loss_turns="last"), tmp_path / "a.jsonl", rows)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_template_does_not_show_is_reported(
    field: str, made: Callable[..., SftEncoder], tmp_path: Path
) -> None:
    row = answer(**{field: "4"})  # which the answer has too
    with pytest.raises(KitError, match=f"does not render field '{field}' of turn 2: write it into the answer's text"):
        encode(made(NONE), tmp_path / "a.jsonl", row)
    cut = made("true").template
    assert "<think>4</think>It is 4." in cut.render([USER, {**ANSWER, "reasoning_content": "4"}])


def test_reasoning_that_is_hidden_in_earlier_turns(made: Callable[..., SftEncoder], tmp_path: Path) -> None:
    thought = {**ANSWER, "thinking": "so"}
    row = {"messages": [USER, thought, USER, {**ANSWER, "content": "It is 5."}]}
    message = (
        "does not render field 'thinking' of turn 2: .*; if it renders that of the last answer, set LOSS_TURNS=last"
    )
    with pytest.raises(KitError, match=message):
        encode(made(), tmp_path / "a.jsonl", {"messages": [*row["messages"], USER, thought]})
    encoded = encode(made(loss_turns="last"), tmp_path / "a.jsonl", row)
    note = "answers outside the loss, whose reasoning the chat template does not render"
    assert encoded.counts[note] == 1 and encoded.lengths.size == 1


def test_a_joined_table_of_two_formats(made: Callable[..., SftEncoder], tmp_path: Path) -> None:
    rows = [{"input": "q", "output": "a", "messages": None}, {**GOOD, "input": None, "output": None}, {**GOOD}]
    with pytest.raises(KitError, match="line 3: it is of format messages, the first row of instruction"):
        encode(made(format="instruction"), tmp_path / "a.jsonl", *rows)
    encoded = encode(made(format="instruction", skip_bad_rows=True), tmp_path / "a.jsonl", *rows)
    assert encoded.lengths.size == 2 and encoded.counts["rows of format messages among those of instruction"] == 1


def test_of_fields_that_are_not_used_the_commonest_are_named() -> None:
    few = {f"rows' field 'f{i:02}', not used": 2 for i in range(30)}
    assert notes_of(Counter({**few, "blank lines": 1, "read": 9})) == {**few, "blank lines": 1}
    many = {f"rows' field 'g{i:02}', not used": 1 for i in range(50)}
    assert notes_of(Counter({**few, **many})) == {**few, "other fields, not used": 50}
