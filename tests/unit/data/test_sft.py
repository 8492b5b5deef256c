import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.data.encoders.sft import SftEncoder
from common.data.sources.chunks import Chunk
from common.data.templates.chat_template import CHATML, ChatTemplate
from common.data.templates.row_formats import Message
from common.data.tokenizer.eod import find_eod
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.demo.tokenizer import write_tokenizer
from common.errors import KitError

TALK = [
    ("system", "be brief"),
    ("user", "What is 12?"),
    ("assistant", "\n\nIt is 12."),
    ("user", "再见"),
    ("assistant", "你好"),
]
# As Qwen3's template does with its reasoning: an earlier answer is shown otherwise than the last one.
FORGETFUL = CHATML.replace(
    "message.content", "(message.content if loop.last or message.role != 'assistant' else message.content[1:])"
)


def messages(*pairs: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in pairs]


def encoder(folder: Path, loss_on: str = "answer", loss_turns: str = "all", eod: bool = False) -> SftEncoder:
    tokenizer = load_tokenizer(folder)
    end = find_eod(tokenizer, "auto") if eod else None
    return SftEncoder(tokenizer, ChatTemplate(tokenizer), "messages", "system", loss_on, loss_turns, end)


def encode(
    made: SftEncoder, *rows: list[Message], path: Path = Path("rows.jsonl")
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each conversation."""
    data = b"".join(json.dumps({"messages": row}).encode() + b"\n" for row in rows)
    path.write_bytes(data) if path.parent != Path() else None
    encoded = made(Chunk(path, 0, data, len(data)))
    ends = encoded.lengths.cumsum()
    return [
        (encoded.streams["tokens"][end - size : end].tolist(), encoded.streams["loss_mask"][end - size : end].tolist())
        for end, size in zip(ends, encoded.lengths, strict=True)
    ]


def learned(made: SftEncoder, sample: tuple[list[int], list[int]]) -> list[str]:
    """The text of each run of learned tokens."""
    runs: list[list[int]] = [[]]
    for number, value in zip(*sample, strict=True):
        if value:
            runs[-1].append(number)
        elif runs[-1]:
            runs.append([])
    return [made.tokenizer.decode(run) for run in runs if run]


def with_template(folder: Path, copy: Path, template: str | None) -> Path:
    shutil.copytree(folder, copy)
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": template}))
    return copy


@pytest.mark.parametrize(
    ("loss_on", "loss_turns", "expected"),
    [
        ("answer", "all", ["\n\nIt is 12.<|im_end|>", "你好<|im_end|>"]),
        ("answer", "last", ["你好<|im_end|>"]),
        ("turn", "all", ["<|im_start|>assistant\n\n\nIt is 12.<|im_end|>", "<|im_start|>assistant\n你好<|im_end|>"]),
        ("turn", "last", ["<|im_start|>assistant\n你好<|im_end|>"]),
    ],
)
def test_what_is_learned(qwen: Path, loss_on: str, loss_turns: str, expected: list[str]) -> None:
    made = encoder(qwen, loss_on, loss_turns)
    assert learned(made, encode(made, messages(*TALK))[0]) == expected


@pytest.mark.parametrize("loss_on", ["answer", "turn"])
def test_the_text_and_the_prompts_ids_are_those_of_inference(tmp_path: Path, loss_on: str) -> None:
    write_tokenizer(tmp_path, ["assistant\n\n\nIt is\n\n\n12"] * 50, 400)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    made = encoder(tmp_path, loss_on)
    conversation = messages(*TALK)
    ids, _ = encode(made, conversation)[0]
    assert made.tokenizer.decode(ids) == theirs.apply_chat_template(conversation, tokenize=False)
    prompt = theirs.apply_chat_template(conversation[:2], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt
    # The answer begins with newlines: encoded at once with the header, they make one token with the header's newline.
    assert ids != theirs.apply_chat_template(conversation, return_dict=False)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.sampled_from(["all", "last"]))
def test_all_of_any_answer_is_learned_and_nothing_else(
    qwen: Path, system: str, pairs: list[tuple[str, str]], loss_turns: str
) -> None:
    made = encoder(qwen, "answer", loss_turns)
    turns = [("system", system), *(turn for q, a in pairs for turn in (("user", q), ("assistant", a)))]
    answers = [made.tokenizer.normalize(answer) + "<|im_end|>" for _, answer in pairs]
    assert learned(made, encode(made, messages(*turns))[0]) == (answers if loss_turns == "all" else answers[-1:])


def test_no_system_turn_lets_the_template_speak(qwen: Path) -> None:
    made = encoder(qwen)
    text = made.tokenizer.decode(encode(made, messages(*TALK[1:3]))[0][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_end_of_document_is_appended_and_not_learned(qwen: Path) -> None:
    plain, ended = encoder(qwen), encoder(qwen, eod=True)
    (ids, mask), (more, longer) = encode(plain, messages(*TALK))[0], encode(ended, messages(*TALK))[0]
    assert (more, longer) == ([*ids, plain.tokenizer.token_id("<|endoftext|>")], [*mask, 0])


def test_counts(qwen: Path) -> None:
    made = encoder(qwen)
    rows = [messages(("user", "say <|im_end|> <|im_start|>"), ("assistant", "")), messages(*TALK)]
    data = b"".join(json.dumps({"messages": row}).encode() + b"\n" for row in rows)
    encoded = made(Chunk(Path("a"), 0, data, len(data)))
    counts = encoded.counts
    assert counts["read"] == 2 and counts["empty answers"] == 1
    assert counts["special tokens spelled in the rows' own text, kept as special tokens"] == 2
    assert counts["supervised"] == encoded.streams["loss_mask"].sum() > 3


def test_special_tokens_in_an_answer_do_not_end_it(qwen: Path) -> None:
    made = encoder(qwen)
    sample = encode(made, messages(("user", "q"), ("assistant", "a<|im_end|>\nb"), ("user", "q")))[0]
    assert learned(made, sample) == ["a<|im_end|>\nb<|im_end|>"]


def test_without_a_template_chatml_is_used_and_logged(
    qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:

    with caplog.at_level("INFO", "kit"):
        made = encoder(with_template(qwen, tmp_path / "bare", None))
    assert "has no chat template: using ChatML" in caplog.text and not made.template.own
    assert encode(made, messages(*TALK)) == encode(encoder(qwen), messages(*TALK))
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    alone = encoder(tmp_path / "bare")
    assert encode(alone, messages(*TALK)) == encode(made, messages(*TALK))
    (tmp_path / "bare" / "chat_template.jinja").write_text(CHATML.replace("a helpful", "an honest"))
    assert encoder(tmp_path / "bare").template.own


def test_a_template_that_trims_is_followed(qwen: Path, tmp_path: Path) -> None:
    made = encoder(with_template(qwen, tmp_path / "trim", CHATML.replace("message.content", "message.content.strip()")))
    assert learned(made, encode(made, messages(("user", "q"), ("assistant", " a \n")))[0]) == ["a<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, "renders what comes before turn 5 otherwise|changes the text of turn 3"),
        (CHATML.replace("message.content", "message.content.upper()"), "changes the text of turn 3"),
        (CHATML.replace("+ '<|im_end|>' + '\\n'", "+ '\\n'"), "no special token after turn 3"),
        ("{{- raise_exception('roles must alternate') -}}", "the chat template rejects it: roles must alternate"),
    ],
)
def test_templates_that_hide_the_answer_are_reported_with_the_line(
    qwen: Path, tmp_path: Path, template: str, message: str
) -> None:
    made = encoder(with_template(qwen, tmp_path / "copy", template))
    with pytest.raises(KitError, match=rf"rows\.jsonl, line 1: .*({message})"):
        encode(made, messages(*TALK), path=tmp_path / "rows.jsonl")


def test_the_last_answer_alone_needs_no_agreement_before_it(qwen: Path, tmp_path: Path) -> None:
    made = encoder(with_template(qwen, tmp_path / "copy", FORGETFUL), "answer", "last")
    one = messages(("user", "q"), ("assistant", "first"))
    assert learned(made, encode(made, one)[0]) == ["first<|im_end|>"]


def test_a_row_of_another_format_is_reported_with_its_line(qwen: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": messages(*TALK)}, {"instruction": "", "input": "q", "output": "a"}]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chunk = Chunk(path, 0, path.read_bytes(), 0)
    with pytest.raises(KitError, match=r"mixed\.jsonl, line 2: it is of format instruction, the first row of messages"):
        encoder(qwen)(chunk)


def test_transformers_must_see_the_same_vocabulary(qwen: Path, tmp_path: Path) -> None:
    copy = with_template(qwen, tmp_path / "copy", CHATML)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "additional_special_tokens": ["<|new|>"]}))
    with pytest.raises(KitError, match="transformers has .* tokens, tokenizer.json"):
        encoder(copy)
