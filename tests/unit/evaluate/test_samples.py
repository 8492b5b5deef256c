"""Rows become windows whose every label counts once, in the mask of step 1, and long rows go where TRUNCATE says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError
from common.evaluate.samples import RowSet, named_inputs, read_row_sets
from common.evaluate.settings import EvaluateSettings
from tests.end_to_end.steps import write_rows
from tests.tiny import tiny_qwen


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


def row_set(qwen: Path, folder: Path, *rows: dict[str, Any], **settings: Any) -> RowSet:
    path = write_rows(folder / "rows.jsonl", list(rows))
    (found,) = read_row_sets(EvaluateSettings(str(qwen), input=str(path), **settings), load_tokenizer(qwen), 512)
    return found


DIGITS = {"text": "0123456789" * 3}  # a token each, and the end of the document
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "0123456789"}]}


@pytest.mark.parametrize(("seq_length", "stride"), [(512, None), (30, None), (8, None), (8, 3), (7, 7), (1, 1)])
def test_each_label_of_a_text_counts_once_with_as_much_context_as_fits(
    qwen: Path, tmp_path: Path, seq_length: int, stride: int | None
) -> None:
    found = row_set(qwen, tmp_path, DIGITS, seq_length=seq_length, stride=stride)
    (whole,) = row_set(qwen, tmp_path, DIGITS).windows
    assert whole.ids.size == 31 and whole.weights.tolist() == [1] * 30
    scored = np.concatenate([window.ids[1:][window.weights > 0] for window in found.windows])
    assert scored.tolist() == whole.ids[1:].tolist()
    starts = range(0, 30, stride or seq_length)
    for start, window in zip(starts, found.windows, strict=False):
        assert window.ids.tolist() == whole.ids[start : start + seq_length + 1].tolist()
    assert found.stride == (stride or seq_length) and found.seq_length == seq_length


def test_a_conversation_counts_where_training_learns(qwen: Path, tmp_path: Path) -> None:
    found = row_set(qwen, tmp_path, CHAT)
    (window,) = found.windows
    tokenizer = load_tokenizer(qwen)
    assert tokenizer.decode(window.ids[1:][window.weights > 0].tolist()) == "0123456789<|im_end|>"
    assert found.format == "messages" and found.stride is None
    heavy = [CHAT["messages"][0], {**CHAT["messages"][1], "loss": 0.5}]
    (weighted,) = row_set(qwen, tmp_path, {"messages": heavy}).windows
    assert weighted.weights.tolist() == (window.weights / 2).tolist()
    (ended,) = row_set(qwen, tmp_path, CHAT, append_eod=True).windows
    assert tokenizer.decode(ended.ids[-1:].tolist()) == "<|endoftext|>" and not ended.weights[-1]


def test_a_long_conversation_goes_where_truncate_says(qwen: Path, tmp_path: Path) -> None:
    (whole,) = row_set(qwen, tmp_path, CHAT).windows
    size = whole.ids.size - 4
    short = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "1"}]}
    with pytest.raises(KitError, match=rf"rows.jsonl, line 2: it has {size + 4} tokens, more than SEQ_LENGTH \+ 1 = "):
        row_set(qwen, tmp_path, short, CHAT, seq_length=size - 1)
    dropped = row_set(qwen, tmp_path, short, CHAT, seq_length=size - 1, truncate="drop")
    assert len(dropped.windows) == 1 and dropped.counts[f"dropped: more than SEQ_LENGTH + 1 = {size} tokens"] == 1
    for truncate, ids in (("left", whole.ids[4:]), ("right", whole.ids[:-4])):
        cut = row_set(qwen, tmp_path, CHAT, seq_length=size - 1, truncate=truncate)
        assert cut.windows[0].ids.tolist() == ids.tolist()
        assert cut.counts[f"truncated from the {truncate}: more than SEQ_LENGTH + 1 = {size} tokens"] == 1
    nothing = row_set(qwen, tmp_path, CHAT, short, seq_length=len(whole.weights) - 12, truncate="right")
    assert len(nothing.windows) == 1 and nothing.counts["dropped: nothing to score after truncation"] == 1


def test_a_row_set_without_rows_is_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"has no row that can be scored: 1 dropped: no text"):
        row_set(qwen, tmp_path, {"text": ""}, append_eod=False)
    with pytest.raises(KitError, match=r"has no row that can be scored: 1 dropped: fewer than two tokens"):
        row_set(qwen, tmp_path, {"text": "1"}, append_eod=False)


def test_files_are_named(tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / name, [DIGITS]) for name in ("one.jsonl", "two words.jsonl"))
    assert named_inputs(str(two)) == [(str(two), [two])]
    assert named_inputs(f"a={two}") == [("a", [two])]
    assert named_inputs(f"math={one} '{two}'") == [("math", [one]), (str(two), [two])]
    assert named_inputs(f"'both={tmp_path}/*.jsonl'") == [("both", [one, two])]
    with pytest.raises(KitError, match="INPUT has a more than once: give each its own name"):
        named_inputs(f"a={one} 'a={two}'")
    with pytest.raises(KitError, match="INPUT: /nowhere.jsonl does not exist"):
        named_inputs("a=/nowhere.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_length": 513}, r"SEQ_LENGTH=513 exceeds the 512 positions of the model \(config.json\): lower it"),
        ({"seq_length": 8, "stride": 9}, "STRIDE=9 exceeds SEQ_LENGTH=8: tokens between windows would not be scored"),
        ({"stride": 0}, "STRIDE=0: it must be at least 1"),
        ({"batch_size": 0}, "BATCH_SIZE=0: it must be at least 1"),
        ({"num_fewshot": 2}, "have no effect without TASKS"),
        ({"json_key": "body"}, "line 1: its fields 'text' match no known format: .* for pretraining it needs body"),
    ],
)
def test_settings_that_cannot_be_are_refused(qwen: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(KitError, match=message):
        row_set(qwen, tmp_path, DIGITS, **settings)
    with pytest.raises(KitError, match="nothing to evaluate: set INPUT to held-out rows, TASKS to tasks, or both"):
        EvaluateSettings(json.dumps(str(qwen)))
