"""What a run sends to Weights & Biases, also where it fails."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ROOT, forked, run, steps, words
from tests.tiny import TEXTS, tiny_qwen


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracking")
    qwen, rows = tiny_qwen(folder / "qwen"), folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} {TEXTS[i % 4]}"}) + "\n" for i in range(100)), encoding="utf-8")
    given = {"input": rows, "output_prefix": folder / "data", "tokenizer_path": qwen, "workers": 1}
    run("-m", "common.preprocess", "pretrain", *words(given))
    return folder


@pytest.mark.parametrize(
    ("name", "flags", "code", "ended"),
    [("ends", {}, 0, 0), ("fails", {"lr": 1e30, "min_lr": 1e30, "max_bad_steps": 1}, 2, 1)],
)
def test_the_figures_and_how_the_run_ended_are_sent(
    work: Path, name: str, flags: dict[str, Any], code: int, ended: int
) -> None:
    settings = {
        "hf_model_path": work / "qwen", "dataset_path": work / "data", "save_checkpoint_path": work / name,
        "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32", "log_interval": 1,
        "split": "80,20,0", "eval_interval": 2, "eval_iters": 1, "train_iters": 3, "lr": 1e-3, "wandb_project": "kit",
        "wandb_mode": "offline", "wandb_exp_name": name, "wandb_save_path": work, **flags,
    }  # fmt: skip
    more = {"PYTHONPATH": f"{ROOT / 'tests' / 'stubs' / 'wandb'}:{ROOT}"}
    log = forked(1, "common.train", words(settings), expect=code, more=more)
    first, *figures, last = map(json.loads, (work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    assert first == {"project": "kit", "mode": "offline", "lr": settings["lr"]} and last == {"exit_code": ended}
    logged = [line for line in figures if "loss" in line]
    assert [(line["step"], f"{line['loss']:.6f}") for line in logged[:1]] == [(1, f"{steps(log)[0][1]:.6f}")]
    assert {"grad_norm", "learning_rate", "tokens_per_s", "tflops_per_gpu", "ms_per_iteration"} <= logged[0].keys()
    if code:
        assert "and none of them was saved" in log and len(logged) == 2 and math.isnan(logged[1]["loss"])
    else:
        assert [line["step"] for line in figures if "validation_loss" in line] == [2, 3] and len(logged) == 3
