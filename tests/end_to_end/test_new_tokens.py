"""NEW_TOKENS: from step 2 to a model that transformers loads, with the tokens' rows, tokenizer and config."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoint.formats.checkpoint_paths import require_checkpoint
from common.checkpoint.verification.verify import verify
from common.errors import KitError
from common.model.shape.config import load_config
from tests.conversion import to_megatron
from tests.distributed.launch import ROOT
from tests.tiny import tiny_qwen

TOKENS: list[dict[str, Any]] = [
    {"token": "<tool>", "description": "the quick brown fox", "special": True},
    {"token": "你好呀", "description": "你好"},
    {"token": " jumps over "},
]


@pytest.fixture(scope="module", params=["spare rows", "grown, untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 512 rows, more than its tokenizer has tokens; or one whose every row is taken."""
    folder = tmp_path_factory.mktemp("model") / "qwen"
    if request.param == "spare rows":
        return tiny_qwen(folder)
    tiny_qwen(folder, tie_word_embeddings=False)
    size = len(AutoTokenizer.from_pretrained(folder))
    for file in folder.iterdir():
        file.unlink()
    return tiny_qwen(folder, tie_word_embeddings=False, vocab_size=size)


def step(number: str, code: int = 0, **settings: Any) -> str:
    script = next((ROOT / "cpu").glob(f"{number}*.sh"))
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in settings.items()}}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_the_tokens_reach_the_exported_model(model: Path, tmp_path: Path, ckpt_format: str) -> None:
    path = write(tmp_path / "tokens.jsonl", TOKENS)
    start, data, out = tmp_path / "start", tmp_path / "sft", tmp_path / "out"
    sizes = {"TP": 2, "PP": 2, "CKPT_FORMAT": ckpt_format}
    log = step("2", CONVERT_TYPE="huggingface-to-megatron", LOAD_CHECKPOINT_PATH=model, SAVE_CHECKPOINT_PATH=start,
               NEW_TOKENS=path, **sizes)  # fmt: skip
    assert "all bits agree" in log and "3 new tokens: ids" in log

    tokenizer, before = AutoTokenizer.from_pretrained(start), AutoTokenizer.from_pretrained(model)
    ids = {row["token"]: tokenizer(row["token"]).input_ids for row in TOKENS}
    assert all(len(found) == 1 for found in ids.values()) and sorted(sum(ids.values(), [])) == [
        len(before), len(before) + 1, len(before) + 2
    ]  # fmt: skip
    assert "<tool>" in tokenizer.all_special_tokens or tokenizer.decode(ids["<tool>"], skip_special_tokens=True) == ""

    step("2", CONVERT_TYPE="megatron-to-huggingface", LOAD_CHECKPOINT_PATH=start, SAVE_CHECKPOINT_PATH=out)
    exported = AutoModelForCausalLM.from_pretrained(out)
    old, new = (load_file(folder / "model.safetensors") for folder in (model, out))
    size = load_config(model).vocab_size
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(old):
        expected = old[name].double()
        if len(new[name]) > size:
            assert len(new[name]) % 128 == 0
            expected = torch.cat([expected, expected.mean(0).expand(len(new[name]) - size, -1)])
        for row in TOKENS:
            sources = before(row.get("description", row["token"])).input_ids
            expected[ids[row["token"]][0]] = old[name].double()[sources].mean(0)
        assert torch.equal(new[name], expected.to(new[name].dtype)), name
    assert exported.config.vocab_size == len(new["model.embed_tokens.weight"])

    if ckpt_format == "torch":
        return
    rows = write(tmp_path / "rows.jsonl", [{"instruction": "", "input": "<tool> 你好呀", "output": "<tool>"}] * 40)
    step("1_preprocess_sft", INPUT=rows, OUTPUT_PREFIX=data, TOKENIZER_PATH=start)
    log = step("3", DATASET_PATH=data, LOAD_CHECKPOINT_PATH=start, SAVE_CHECKPOINT_PATH=tmp_path / "run", GPUS=2,
               TP=2, PP=1, TRAIN_MODE="finetune", SEQ_LENGTH=64, TRAIN_ITERS=2, OMP_NUM_THREADS=1)  # fmt: skip
    assert "stopped after iteration 2 of 2" in log


def test_a_wrong_row_would_be_seen(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "tokens.jsonl", TOKENS)
    start = to_megatron(model, tmp_path / "start", new_tokens=str(path), ckpt_format="torch_dist")
    qwen, tokenizer = load_config(start), AutoTokenizer.from_pretrained(model)
    first = len(tokenizer)
    sources = {first + i: tokenizer(row.get("description", row["token"])).input_ids for i, row in enumerate(TOKENS)}
    found = require_checkpoint(start)
    assert not verify(model, found, qwen, new_rows=(sources, qwen.vocab_size)).errors
    for wrong in ({**sources, first: [1]}, {**sources, first + 2: sources[first + 2][:-1]}):
        assert verify(model, found, qwen, new_rows=(wrong, qwen.vocab_size)).errors
    assert verify(model, found, qwen).errors


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "names no token"),
        ([{"token": "<a>"}, {"token": "<a>"}], "tokens.jsonl:2: '<a>' is on line 1 too"),
        ([{"token": "<|im_end|>"}], "is token"),
        ([{"token": "<a>", "description": ""}], "tokens.jsonl:1: its description '' has no token with a row"),
        ([{"text": "<a>"}], "tokens.jsonl:1: it has other fields"),
        ([{"token": " "}], "token and description must be texts"),
        ([{"token": "<a>", "special": 1}], "special is 1"),
        (["<a>"], "tokens.jsonl:1: it has other fields"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    model, path = tiny_qwen(tmp_path / "qwen"), write(tmp_path / "tokens.jsonl", rows)
    with pytest.raises(KitError, match=re.escape(message)):
        to_megatron(model, tmp_path / "out", new_tokens=str(path))
    assert not (tmp_path / "out").exists()


def test_a_wrong_line_ends_the_script(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens.jsonl", [{"token": "<|im_end|>"}])
    log = step("2", 2, CONVERT_TYPE="huggingface-to-megatron", LOAD_CHECKPOINT_PATH=tiny_qwen(tmp_path / "qwen"),
               SAVE_CHECKPOINT_PATH=tmp_path / "out", NEW_TOKENS=path)  # fmt: skip
    assert "is token" in log and "Traceback" not in log
