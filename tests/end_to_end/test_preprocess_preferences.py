"""cpu/1_preprocess_sft.sh on preferences: every shape, bad rows, and pairs that stay whole when work is split."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonlines
import pytest

from common.data.dataset.indexed_dataset import IndexedDataset
from common.data.tokenizer.text_tokenizer import load_tokenizer
from tests.distributed.launch import environment
from tests.end_to_end.steps import ROOT, write_rows
from tests.end_to_end.test_preprocess_rows import preprocess
from tests.preferences import pair_rows
from tests.tiny import tiny_qwen

USER, GOOD, BAD = (
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "assistant", "content": "No idea."},
)
SHAPES: list[dict[str, Any]] = [
    {"prompt": "What is 2+2?", "chosen": "It is 4.", "rejected": "No idea."},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.5},
    {"conversations": [{"from": "human", "value": "What is 2+2?"}], "chosen": GOOD, "rejected": BAD},
    {"instruction": "", "input": "What is 2+2?", "chosen": "It is 4.", "rejected": "No idea."},
]
ODD: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": "same", "rejected": "same"},
    {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "3?"}, BAD]},
    {"chosen": "It is 4.", "rejected": "No idea."},
    {"messages": [USER, GOOD]},
    # NFC, which the tokenizer applies, makes them one text.
    {"prompt": "a", "chosen": "caf\u00e9", "rejected": "cafe\u0301"},
]
CAUSES = [
    "its 'chosen' and 'rejected' answers are equal: there is nothing to prefer", "differ before their last turn",
    "answers without a prompt", "it is of format messages, the first row of preference", "are equal as tokens",
]  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


def documents(prefix: Path, qwen: Path) -> list[tuple[str, str]]:
    """(text, what is learned of it) of each document."""
    tokenizer = load_tokenizer(qwen)
    tokens, masks = (IndexedDataset(Path(f"{prefix}_{name}_document")) for name in ("text", "loss_mask"))
    return [
        (tokenizer.decode(tokens[i].tolist()), tokenizer.decode(tokens[i][masks[i] > 0].tolist()))
        for i in range(len(tokens))
    ]


def test_every_shape_becomes_two_documents_with_the_loss_on_the_last_answer(tmp_path: Path, qwen: Path) -> None:
    talk = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}
    rows = write_rows(tmp_path / "a.jsonl", [*SHAPES, talk])
    log = preprocess(0, INPUT=rows, OUTPUT_PREFIX=tmp_path / "out", TOKENIZER_PATH=qwen, WORKERS=1)
    assert "rows are of format preference" in log and "6 pairs, " in log
    assert "rows' field 'score_chosen', not used: 1" in log
    found = documents(tmp_path / "out", qwen)
    prompt = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    answers = [f"{turn['content']}<|im_end|>" for turn in (GOOD, BAD)]
    for number in range(len(SHAPES)):
        for (text, learned), answer in zip(found[2 * number : 2 * number + 2], answers, strict=True):
            assert text.endswith(f"{prompt}{answer}\n") and learned == answer
    for (text, learned), answer in zip(found[-2:], answers, strict=True):
        assert text.endswith(f"{prompt}{answers[0]}\n{prompt}{answer}\n") and learned == answer
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["kind"] == "preference" and manifest["documents"]["kept"] == 6 and len(found) == 12
    assert manifest["settings"]["loss_turns"] == "last"


def test_bad_rows_are_named_or_skipped_as_pairs(tmp_path: Path, qwen: Path) -> None:
    settings = {"OUTPUT_PREFIX": tmp_path / "out", "TOKENIZER_PATH": qwen, "WORKERS": 1}
    for row, cause in zip(ODD, CAUSES, strict=True):
        rows = write_rows(tmp_path / "one.jsonl", [SHAPES[0], row])
        assert re.search(f"error: .*one.jsonl, line 2: .*{re.escape(cause)}", preprocess(2, INPUT=rows, **settings))
    rows = write_rows(tmp_path / "all.jsonl", [SHAPES[0], *ODD, SHAPES[1]])
    log = preprocess(0, INPUT=rows, **settings, ON_ERROR="skip")
    assert f"dropped {len(ODD)} documents: bad rows" in log and "2 pairs, " in log
    with jsonlines.open(tmp_path / "out.rejects") as reader:
        assert [row["line"] for row in reader] == [2, 3, 4, 5, 6]
    assert len(documents(tmp_path / "out", qwen)) == 4
    rows = write_rows(tmp_path / "weights.jsonl", SHAPES)
    log = preprocess(2, INPUT=rows, OUTPUT_PREFIX=tmp_path / "w", TOKENIZER_PATH=qwen, LOSS_WEIGHTS="true")
    assert "LOSS_WEIGHTS=true is for conversations, and these are preferences" in log


def test_partitions_resumed_runs_and_workers_write_the_same_bytes(tmp_path: Path, qwen: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(3000))
    given = {"INPUT": rows, "TOKENIZER_PATH": qwen}
    preprocess(0, **given, OUTPUT_PREFIX=tmp_path / "whole", WORKERS=2)
    for index in range(3):
        preprocess(0, **given, OUTPUT_PREFIX=tmp_path / "merged", WORKERS=1, PARTITIONS=3, PARTITION_INDEX=index)
        if index == 1:
            preprocess(0, **given, OUTPUT_PREFIX=tmp_path / "resumed", WORKERS=1, PARTITIONS=3, PARTITION_INDEX=index)
    merge = [sys.executable, "-m", "common.preprocess", "merge", "--output-prefix", str(tmp_path / "merged")]
    subprocess.run(merge, cwd=ROOT, env=environment(), check=True, capture_output=True)
    log = preprocess(0, **given, OUTPUT_PREFIX=tmp_path / "resumed", WORKERS=1, PARTITIONS=3)
    assert "reusing part" in log and "3000 pairs, " in log
    for end in ("text_document.bin", "text_document.idx", "loss_mask_document.bin", "loss_mask_document.idx"):
        whole = (tmp_path / f"whole_{end}").read_bytes()
        assert (tmp_path / f"merged_{end}").read_bytes() == whole == (tmp_path / f"resumed_{end}").read_bytes(), end
    manifests = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "merged", "resumed")]
    assert len({each["identity"] for each in manifests}) == 1
    assert [each["documents"]["kept"] for each in manifests] == [3000] * 3
