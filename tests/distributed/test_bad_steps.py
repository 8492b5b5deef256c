"""Steps whose loss or gradient is NaN: one embedding of the model is NaN, and a few samples use it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.conversion import to_hf, to_megatron
from tests.distributed.launch import run, steps, words
from tests.distributed.user import step3, step3_forked
from tests.tiny import TEXTS, tiny_qwen

POISON = "~"  # in none of TEXTS


@pytest.fixture(scope="module")
def poisoned(work: Path) -> Path:
    """A start whose embedding of POISON is NaN, and data with it in two of 200 rows."""
    folder = tiny_qwen(work / "poisoned_hf", std=0.05, spread=0.05, tie_word_embeddings=False)
    (token,) = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(POISON, add_special_tokens=False).ids
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    to_megatron(folder, work / "poisoned_start", ckpt_format="torch_dist")
    rows = [f'{{"text": "{i} {TEXTS[0] * 3}{POISON if i in (60, 140) else ""}"}}\n' for i in range(200)]
    (work / "poisoned.jsonl").write_text("".join(rows))
    flags = {"input": work / "poisoned.jsonl", "output_prefix": work / "poisoned", "tokenizer_path": folder}
    run("-m", "common.preprocess", "pretrain", *words({**flags, "workers": 1}))
    return work


def settings(work: Path, name: str, **more: Any) -> dict[str, Any]:
    paths = {"DATASET_PATH": work / "poisoned", "LOAD_CHECKPOINT_PATH": work / "poisoned_start"}
    sizes = {"SAVE_CHECKPOINT_PATH": work / name, "EPOCHS": 1, "SPLIT": "100,0,0", "MICRO_BATCH_SIZE": 1}
    return {**paths, **sizes, **more}


SKIPPED = re.compile(
    r"iteration (\d+) skipped: gradient norm nan: the loss is not finite on rank (.*), in samples (.*);"
    r" gradients are not finite on rank (.*) \((\d+) in all\)"
)


@pytest.mark.parametrize("layout", [{"GPUS": 2, "PRECISION": "bf16"}, {"GPUS": 2, "PP": 2}], ids=["dp2_bf16", "pp2"])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(poisoned: Path, layout: dict[str, Any]) -> None:
    name = f"skipped_{len(layout)}_{'PP' in layout}"
    log = step3_forked(settings(poisoned, name, **layout))
    found = SKIPPED.findall(log)
    assert len(found) == 2, log[-3000:]
    iteration, rank, samples, _, number = found[0]
    assert number == "1" and (int(iteration) - 1) * 8 <= int(samples.split(",")[0]) < int(iteration) * 8
    assert rank == "1" if "PP" in layout else rank in ("0", "1")
    line = next(each for each in log.splitlines() if f" iteration {iteration}/" in each)
    assert re.search(rf"iteration {iteration}/\d+ +nan ", line)  # none of the interval's steps counts
    # What is saved is finite but for the row that never was, and has learned.
    weights = load_file(to_hf(poisoned / name, poisoned / f"{name}_hf") / "model.safetensors")
    bad = {key: int((~torch.isfinite(tensor)).any(-1).sum()) for key, tensor in weights.items()}
    assert {key: rows for key, rows in bad.items() if rows} == {"model.embed_tokens.weight": 1}
    losses = [loss for _, loss, _ in steps(log)]
    assert losses[-1] < 0.8 * losses[0]


def test_nothing_is_saved_on_a_bad_step_and_too_many_in_a_row_end_the_run(poisoned: Path) -> None:
    # Every row has it: each step is bad, from the first on.
    rows = [f'{{"text": "{i} {POISON} {TEXTS[0]}"}}\n' for i in range(60)]
    (poisoned / "all.jsonl").write_text("".join(rows))
    flags = {"input": poisoned / "all.jsonl", "output_prefix": poisoned / "all", "workers": 1}
    run("-m", "common.preprocess", "pretrain", *words({**flags, "tokenizer_path": poisoned / "poisoned_hf"}))
    given = settings(poisoned, "all_bad", DATASET_PATH=poisoned / "all", SAVE_INTERVAL=1, MAX_BAD_STEPS=3)
    log = step3(given, poisoned / "all_bad.log", 2)
    assert log.count(" skipped: ") == 3 and "saved " not in log and "Traceback" not in log
    assert "error: 3 steps in a row were skipped, the last at iteration 3, and none of them was saved:" in log
    assert "MAX_BAD_STEPS=3; none is in" in log
    assert not list((poisoned / "all_bad").glob("iter_*"))


def test_steps_above_skip_grad_norm_are_counted_and_skipped(poisoned: Path) -> None:
    own = {"DATASET_PATH": poisoned / "pretrain", "LOAD_CHECKPOINT_PATH": poisoned / "start"}
    given = settings(poisoned, "spikes", **own, TRAIN_ITERS=4, EPOCHS="")
    log = step3_forked({**given, "SKIP_GRAD_NORM": 1e-3, "MAX_BAD_STEPS": 0, "LR": 0.1})
    assert len(re.findall(r"skipped: the gradient norm \S+ is above SKIP_GRAD_NORM=0.001", log)) == 4
    assert "(4 in all)" in log and "weights are not finite" not in log
