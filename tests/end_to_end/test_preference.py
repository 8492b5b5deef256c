"""The road of preferences through the scripts of cpu/: from rows to an exported model that prefers as they do."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from common.demo.corpus import SYSTEM, TASKS, Fact, facts
from common.demo.sample import write_sample
from common.ports import free_port
from common.report.plots import panels
from common.report.runs import read_run
from common.training.tracking.records import read_metrics
from tests.end_to_end.steps import write_rows
from tests.end_to_end.test_scripts import script
from tests.preferences import log_probs

ENDINGS = {"en": " That is all.", "zh": "就是这样。"}


def pair_of(fact: Fact) -> dict[str, Any]:
    """The preference to end an answer in the language of the question, in neither of which a random model is better."""
    chosen, rejected = (f"{fact.answer}{ENDINGS[each]}" for each in ("en", "zh"))
    if fact.language == "zh":
        chosen, rejected = rejected, chosen
    return {"prompt": fact.question, "system": SYSTEM[fact.language], "chosen": chosen, "rejected": rejected}


def balanced(seed: int, number: int, *, held: bool) -> Iterator[Fact]:
    """As many facts in English as in Chinese."""
    left = dict.fromkeys(SYSTEM, number // 2)
    for fact in facts(seed, TASKS, held=held):
        if left[fact.language]:
            left[fact.language] -= 1
            yield fact
        if not any(left.values()):
            return


def accuracy(model: Path, data: Path) -> float:
    """The share of pairs whose chosen answer Hugging Face's model finds more likely."""
    with torch.no_grad():
        found, _ = log_probs(Qwen2ForCausalLM.from_pretrained(model).float(), data)
    return float((found[:, 0] > found[:, 1]).float().mean())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's random model, its checkpoint, and pairs to train on and to hold out."""
    tmp_path = tmp_path_factory.mktemp("preference")
    write_sample(tmp_path / "sample", seed=1)
    model = tmp_path / "sample/model"
    sets = {"train": balanced(1, 640, held=False), "held_out": balanced(2, 100, held=True)}
    for name, each in sets.items():
        rows = write_rows(tmp_path / f"{name}.jsonl", [pair_of(fact) for fact in each])
        script("1_preprocess_sft", INPUT=rows, OUTPUT_PREFIX=tmp_path / name, TOKENIZER_PATH=model, WORKERS=1)
    script(
        "2_convert_between_hf_megatron", CONVERT_TYPE="huggingface-to-megatron", LOAD_CHECKPOINT_PATH=model,
        SAVE_CHECKPOINT_PATH=tmp_path / "start",
    )  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_quickstarts_model_learns_a_preference(work: Path, tmp_path: Path, tuner: str) -> None:
    more = {"TUNER": "lora", "LORA_RANK": 8, "LR": "2e-2"} if tuner == "lora" else {"LR": "2e-3"}
    log = script(
        "3_run_mcore_qwen", TRAIN_MODE="dpo", DATASET_PATH=work / "train", LOAD_CHECKPOINT_PATH=work / "start",
        SAVE_CHECKPOINT_PATH=tmp_path / "run", VALID_DATASET_PATH=f"held_out {work}/held_out", SEQ_LENGTH=128,
        GLOBAL_BATCH_SIZE=32, MICRO_BATCH_SIZE=16, TRAIN_ITERS=20, MIN_LR="2e-4",
        EVAL_INTERVAL=10, LOG_INTERVAL=1, MASTER_PORT=free_port(), **more,
    )  # fmt: skip
    script(
        "2_convert_between_hf_megatron", CONVERT_TYPE="megatron-to-huggingface",
        LOAD_CHECKPOINT_PATH=tmp_path / "run", SAVE_CHECKPOINT_PATH=tmp_path / "trained",
    )  # fmt: skip
    before, after = (accuracy(each, work / "held_out") for each in (work / "sample/model", tmp_path / "trained"))
    assert 0.35 <= before <= 0.65 and after >= 0.9, (before, after)
    first, last = (read_metrics(tmp_path / "run")[at] for at in (0, -1))
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)  # the model is its own reference
    assert last["validation_accuracy"] >= 0.9 and last["validation_loss"] < 0.4
    assert f"accuracy {last['validation_accuracy']:.1%}" in log and "reward +  reward -   log p +   log p -" in log
    assert {"Accuracy", "Reward margin"} <= {panel.title for panel in panels([read_run(tmp_path / "run")])}
    assert json.loads((tmp_path / "run/run.json").read_text())["starts"][0]["settings"]["dpo_beta"] == 0.1
