"""Tokens that were added to the tokenizer and not to the model: refused by the script before any process starts."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from common.ports import free_port
from tests.distributed.launch import run, words
from tests.distributed.user import Run
from tests.tiny import TEXTS, tiny_qwen


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 400 ids, and data of its tokenizer with 20 tokens more."""
    folder = tmp_path_factory.mktemp("new_tokens")
    tiny_qwen(folder / "hf", vocab_size=400)
    tokenizer = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    fill = [f"<fill_{i}>" for i in range(400 - tokenizer.get_vocab_size())]
    tokenizer.add_tokens([AddedToken(text) for text in [*fill, *(f"<loc_{i}>" for i in range(20))]])
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    for kind, row in (
        ("pretrain", {"text": f"{TEXTS[0]} <loc_19> {TEXTS[1]}"}),
        ("sft", {"messages": [{"role": "user", "content": "<loc_3>?"}, {"role": "assistant", "content": "<loc_19>"}]}),
    ):
        (folder / f"{kind}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
        flags = {"input": folder / f"{kind}.jsonl", "output_prefix": folder / kind, "tokenizer_path": folder / "hf"}
        log = run("-m", "common.preprocess", kind, *words({**flags, "workers": 1}))
        assert "the tokenizer's largest id is 419, that of" in log and "(vocab_size=400)" in log
        assert json.loads((folder / f"{kind}.json").read_text())["largest_id"] == 419
    return folder


@pytest.mark.parametrize(
    "data, tp", [("pretrain", 1), ("pretrain", 2), ("pretrain, no manifest", 2), ("sft", 2), ("valid", 1)]
)
def test_ids_above_the_embedding_are_refused(work: Path, tmp_path: Path, data: str, tp: int) -> None:
    kind = "sft" if data == "sft" else "pretrain"
    if data == "pretrain, no manifest":
        for end in (".bin", ".idx"):
            (tmp_path / f"bare_text_document{end}").symlink_to(work / f"pretrain_text_document{end}")
    path = tmp_path / "bare" if "no manifest" in data else work / kind
    settings = {
        "DATASET_PATH": path, "SAVE_CHECKPOINT_PATH": tmp_path / "run", "HF_MODEL_PATH": work / "hf", "TP": tp,
        "GPUS": tp, "TRAIN_MODE": "finetune" if kind == "sft" else "pretrain", "TRAIN_ITERS": 2,
        "MASTER_PORT": free_port(), "PRECISION": "fp32",
    }  # fmt: skip
    if data == "valid":  # good training data, and these to be validated on
        rows = f"{json.dumps({'text': TEXTS[0]})}\n" * 40
        (tmp_path / "good.jsonl").write_text(rows)
        flags = {"input": tmp_path / "good.jsonl", "output_prefix": tmp_path / "good", "tokenizer_path": work / "hf"}
        run("-m", "common.preprocess", "pretrain", *words({**flags, "workers": 1}))
        settings |= {"DATASET_PATH": tmp_path / "good", "VALID_DATASET_PATH": path}
    for more in ((), ("--check",)) if tp == 1 else ((),):
        log = Run(settings, tmp_path / "log", more).end(2)
        assert "text_document.bin holds the token id 419, but the model's largest id is 399 (vocab_size=400 in " in log
        assert "Traceback" not in log and "processes = TP" not in log
    assert not (tmp_path / "run").exists()


def test_a_damaged_index_is_refused_before_anything_starts(work: Path, tmp_path: Path) -> None:
    for end in (".bin", ".idx"):
        (tmp_path / f"bad_text_document{end}").write_bytes((work / f"pretrain_text_document{end}").read_bytes())
    index = bytearray((tmp_path / "bad_text_document.idx").read_bytes())
    index[34 + 4 * 10] += 1
    index[34 + 4 * 11] -= 1  # of the lengths, whose sum is as it was
    (tmp_path / "bad_text_document.idx").write_bytes(index)
    settings = {
        "DATASET_PATH": tmp_path / "bad", "SAVE_CHECKPOINT_PATH": tmp_path / "run", "HF_MODEL_PATH": work / "hf",
        "TRAIN_ITERS": 2, "MASTER_PORT": free_port(), "GPUS": 2, "PRECISION": "fp32",
    }  # fmt: skip
    log = Run(settings, tmp_path / "log").end(2)
    assert "bad_text_document.idx is damaged: sequence 11 begins at byte" in log and "Traceback" not in log
