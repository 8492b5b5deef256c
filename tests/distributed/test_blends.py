"""Training on a weighted blend of datasets, as users run it."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run, train, words
from tests.tiny import TEXTS, tiny_qwen


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three datasets of its tokenizer, one of another."""
    folder = tmp_path_factory.mktemp("blends")
    tiny_qwen(folder / "hf")
    tiny_qwen(folder / "other")
    path = folder / "other" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    for name, tokenizer in (("a", "hf"), ("b c", "hf"), ("valid", "hf"), ("foreign", "other")):
        rows = (json.dumps({"text": f"{name} {i}: {TEXTS[i % 4]}"}) + "\n" for i in range(60))
        (folder / f"{name}.txt").write_text("".join(rows))
        flags = {"input": folder / f"{name}.txt", "output_prefix": folder / name, "tokenizer_path": folder / tokenizer}
        run("-m", "common.preprocess", "pretrain", *words({**flags, "workers": 1}))
    return folder


def test_a_blend_trains_and_resumes_only_as_the_same_blend(work: Path) -> None:
    flags = {
        "dataset_path": f"0.7 {work}/a 0.3 '{work}/b c'", "valid_dataset_path": work / "valid",
        "save_checkpoint_path": work / "run", "hf_model_path": work / "hf", "seq_length": 32, "micro_batch_size": 2,
        "global_batch_size": 4, "precision": "fp32", "lr": 1e-3, "min_lr": 1e-4, "log_interval": 1, "eval_iters": 1,
        "eval_interval": 2,
    }  # fmt: skip
    log = train(**flags, train_iters=4, exit_interval=2)
    assert "blend: a_text_document: 0.7000 of the samples" in log and "stopped after iteration 2 of 4" in log
    assert "validation" in log
    refused = {**flags, "dataset_path": f"0.6 {work}/a 0.4 '{work}/b c'"}
    log = train(expect=2, **refused, train_iters=4)
    assert "was trained on other samples (blend 7/10 of " in log
    log = train(**flags, train_iters=4)
    assert "stopped after iteration 4 of 4" in log


def test_data_of_another_tokenizer_is_refused_before_anything_starts(work: Path) -> None:
    flags = {"save_checkpoint_path": work / "no", "hf_model_path": work / "hf", "train_iters": 1, "seq_length": 32}
    log = train(expect=2, **flags, dataset_path=work / "foreign")
    assert "foreign_text_document was made with another tokenizer than" in log and "Traceback" not in log
    log = train(expect=2, **flags, dataset_path=f"1 {work}/a", valid_dataset_path=work / "foreign")
    assert "foreign_text_document was made with another tokenizer than" in log
