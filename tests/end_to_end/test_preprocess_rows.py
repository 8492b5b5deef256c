"""cpu/1_preprocess_sft.sh on rows as real datasets have them: they are learned, or the row is reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonlines
import pytest

from common.data.dataset.indexed_dataset import IndexedDataset
from tests.end_to_end.steps import ROOT, write_rows
from tests.tiny import tiny_qwen

QUESTION = {"from": "human", "value": "What is 2+2?", "weight": None}
ANSWER = {"from": "gpt", "value": "It is 4.", "weight": 1.0}
GOOD: dict[str, Any] = {"id": 7, "conversations": [QUESTION, ANSWER], "messages": None, "source": "x"}


def turns(*more: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**GOOD, "conversations": [QUESTION, ANSWER, *more], **fields}


ODD = [
    turns(QUESTION, {**ANSWER, "value": "wrong", "mask": True}),
    turns(tools=[{"type": "function", "function": None}]),
    turns({"from": "function_call", "value": '{"name": "f", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3001}),
    turns({"from": "function_call", "value": '{"name": "f", "arguments": {"a": "\\ud800"}}'}),
    turns(QUESTION, {**ANSWER, "weight": 1e39}),
    turns(QUESTION, {**ANSWER, "thinking": "Two and two."}),
    turns(images=["a.png"]),
    {**GOOD, "conversations": [ANSWER, QUESTION, ANSWER]},
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


def preprocess(expect: int, **settings: object) -> str:
    environment = {**os.environ, "PYTHON": sys.executable, **{key: str(value) for key, value in settings.items()}}
    done = subprocess.run(
        ["bash", "cpu/1_preprocess_sft.sh"], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout[-4000:]
    return done.stdout


def test_odd_rows_are_reported_one_by_one_and_skipped_with_on_error_skip(tmp_path: Path, qwen: Path) -> None:
    good = [
        turns(QUESTION, {**ANSWER, "value": "wrong", "weight": 0}),
        GOOD,
        turns(QUESTION, {**ANSWER, "from": "chatgpt"}),
    ]
    rows = write_rows(tmp_path / "a.jsonl", [*good, *ODD, *good])
    settings = {"INPUT": rows, "OUTPUT_PREFIX": tmp_path / "out", "TOKENIZER_PATH": qwen, "WORKERS": 2}
    output = preprocess(2, **settings)
    assert f"error: {rows}, line 4: conversations: turn 4: field 'mask' is not supported" in output
    assert output.count("ON_ERROR=skip") == 1 and "Traceback" not in output
    output = preprocess(0, **settings, ON_ERROR="skip")
    assert f"dropped {len(ODD)} documents: bad rows, written to the rejects file" in output
    assert "rows' field 'id', not used: 6" in output and "rows' field 'source', not used: 6" in output
    with jsonlines.open(tmp_path / "out.rejects") as reader:
        rejects = list(reader)
    assert [row["line"] for row in rejects] == list(range(4, 4 + len(ODD)))
    assert [json.loads(row["row"]) for row in rejects] == json.loads(json.dumps(ODD))
    learned = [int(mask.sum()) for mask in IndexedDataset(tmp_path / "out_loss_mask_document")]
    assert len(learned) == 6 and learned[0] == learned[1] and learned[2] == 2 * learned[1]
