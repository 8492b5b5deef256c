"""Step 5 as users run it: its loss is that of transformers and that of step 3's validation; tasks by lm-eval."""

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.ports import free_port
from tests.end_to_end.steps import ROOT, chats, write_rows
from tests.tiny import TEXTS, tiny_qwen

EXAMPLE = ROOT / "docs" / "examples" / "tasks"
HAS_HARNESS = find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("my model") / "qwen", std=0.05, spread=0.05)


def script(name: str, expect: int = 0, **settings: object) -> tuple[str, str]:
    """(stdout, stderr) of a script of cpu/."""
    given = {"PYTHON": sys.executable, **{name: str(value) for name, value in settings.items()}}
    done = subprocess.run(
        ["bash", f"cpu/{name}.sh"], cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == expect and "Traceback" not in done.stderr, done.stderr[-6000:]
    return done.stdout, done.stderr


def evaluate(folder: Path, **settings: object) -> tuple[dict[str, Any], str]:
    """(OUTPUT, stdout) of step 5, which writes to `folder`."""
    output = folder / "new" / "results.json"
    shown, _ = script("5_evaluate", OUTPUT=output, **settings)
    content = json.loads(output.read_text(encoding="utf-8"))
    output.unlink()
    return content, shown


def transformers_loss(folder: Path, samples: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """transformers' own loss of (ids, labels) a row, as the mean over all labels that are not -100; their number."""
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    total, number = 0.0, 0
    for ids, labels in samples:
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        count = sum(label != -100 for label in labels[1:])
        total, number = total + float(loss) * count, number + count
    return total / number, number


def test_the_loss_is_that_of_transformers(qwen: Path, tmp_path: Path) -> None:
    """Of texts and conversations, whatever the batch size; ids, prompt and labels are transformers' own here."""
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    texts = [{"text": text} for text in TEXTS]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    pretrain = [([*tokenizer(row["text"])["input_ids"], end],) * 2 for row in texts]
    finetune = []
    for row in chats(9):
        turns = [{"role": "system", "content": row["instruction"]}] if row["instruction"] else []
        turns += [{"role": "user", "content": row["input"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt)["input_ids"]
        ids = [*before, *tokenizer(f"{row['output']}<|im_end|>")["input_ids"], *tokenizer("\n")["input_ids"]]
        finetune.append((ids, [-100] * len(before) + ids[len(before) : -1] + [-100]))
    rows = {"texts": write_rows(tmp_path / "t.jsonl", texts), "chats": write_rows(tmp_path / "c.jsonl", chats(9))}
    named = " ".join(f"{name}={path}" for name, path in rows.items())
    for batch_size in (1, 4):
        content, shown = evaluate(tmp_path, HF_MODEL_PATH=qwen, INPUT=named, DTYPE="fp32", BATCH_SIZE=batch_size)
        for found, samples in zip(content["rows"], (pretrain, finetune), strict=True):
            loss, number = transformers_loss(qwen, samples)
            assert abs(found["loss"] - loss) < 1e-5 and found["supervised_tokens"] == number
            assert math.isclose(found["perplexity"], math.exp(loss), rel_tol=1e-4)
            assert f"{found['loss']:.6f}" in shown
        together, number = transformers_loss(qwen, pretrain + finetune)
        assert abs(content["all"]["loss"] - together) < 1e-5 and content["all"]["supervised_tokens"] == number
    assert [found["format"] for found in content["rows"]] == ["text", "instruction"]
    assert shown.splitlines()[0].split() == ["rows", "of", "rows", "windows", "supervised", "loss", "perplexity"]


def test_windows_of_a_long_text_are_those_of_transformers_guide(qwen: Path, tmp_path: Path) -> None:
    """The sliding window of https://huggingface.co/docs/transformers/perplexity."""
    ids = AutoTokenizer.from_pretrained(qwen)(" ".join(TEXTS * 3))["input_ids"]
    samples, before, length, stride = [], 0, 64, 24
    for start in range(0, len(ids), stride):
        stop = min(start + length + 1, len(ids))
        part = ids[start:stop]
        samples.append((part, [-100] * max(before - start, 0) + part[max(before - start, 0) :]))
        before = stop
        if stop == len(ids):
            break
    path = write_rows(tmp_path / "t.jsonl", [{"text": " ".join(TEXTS * 3)}])
    settings = {"HF_MODEL_PATH": qwen, "INPUT": path, "DTYPE": "fp32", "SEQ_LENGTH": length, "STRIDE": stride}
    content, _ = evaluate(tmp_path, APPEND_EOD="false", **settings)
    (found,) = content["rows"]
    loss, number = transformers_loss(qwen, samples)
    assert abs(found["loss"] - loss) < 1e-5 and found["supervised_tokens"] == number == len(ids) - 1
    assert (found["windows"], found["seq_length"], found["stride"]) == (len(samples), length, stride) and len(
        samples
    ) > 3


SEQ = 64
DIGITS = [str(number * 7919 % 10) for number in range(8 * SEQ)]  # a token each


@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_the_loss_is_that_of_step_3s_validation(qwen: Path, tmp_path: Path, kind: str) -> None:
    """On the same samples: conversations, or a text whose windows are step 3's samples; in float32, at one process."""
    rows, data, start, run = (tmp_path / name for name in ("rows.jsonl", "data", "start", "run"))
    write_rows(rows, chats(8) if kind == "finetune" else [{"text": "".join(DIGITS)}])
    step_1 = "1_preprocess_sft" if kind == "finetune" else "1_preprocess_pretrain"
    script(step_1, INPUT=rows, OUTPUT_PREFIX=data, TOKENIZER_PATH=qwen, WORKERS=1)
    script(
        "2_convert_between_hf_megatron", CONVERT_TYPE="huggingface-to-megatron", LOAD_CHECKPOINT_PATH=qwen,
        SAVE_CHECKPOINT_PATH=start,
    )  # fmt: skip
    _, log = script(
        "3_run_mcore_qwen", TRAIN_MODE=kind, DATASET_PATH=data, VALID_DATASET_PATH=data, LOAD_CHECKPOINT_PATH=start,
        SAVE_CHECKPOINT_PATH=run, TP=1, PP=1, GPUS=1, SEQ_LENGTH=SEQ, TRAIN_ITERS=2, EVAL_INTERVAL=2, EVAL_ITERS=2,
        MICRO_BATCH_SIZE=4, GLOBAL_BATCH_SIZE=4, LR="1e-3", PRECISION="fp32", MASTER_PORT=free_port(),
    )  # fmt: skip
    (validation,) = re.findall(r"validation at iteration 2 +loss ([\d.]+) .* 8 samples", log)
    for step, needed in (("4_chat", {}), ("5_evaluate", {"INPUT": rows})):
        _, said = script(step, 2, HF_MODEL_PATH=run, **needed)
        assert f"HF_MODEL_PATH={run} is a Megatron checkpoint, not an exported model: run step 2, CONVERT_TYPE=" in said
    exported = tmp_path / "exported"
    script(
        "2_convert_between_hf_megatron", CONVERT_TYPE="megatron-to-huggingface", LOAD_CHECKPOINT_PATH=run,
        SAVE_CHECKPOINT_PATH=exported,
    )  # fmt: skip
    content, _ = evaluate(tmp_path, HF_MODEL_PATH=exported, INPUT=rows, SEQ_LENGTH=SEQ)
    (found,) = content["rows"]
    assert found["windows"] == 8 and content["dtype"] == "float32"
    assert abs(found["loss"] - float(validation)) < 1e-4, (found, validation)


@pytest.mark.skipif(HAS_HARNESS, reason="lm-evaluation-harness is installed")
def test_without_the_harness_tasks_are_refused_with_how_to_install_it(qwen: Path) -> None:
    _, said = script("5_evaluate", 2, HF_MODEL_PATH=qwen, TASKS="capitals")
    assert f"not installed: {sys.executable} -m pip install -r requirements/eval.txt; or leave TASKS empty" in said


def likelier(folder: Path, row: dict[str, Any]) -> tuple[int, int]:
    """The numbers of the choices that transformers' model finds likeliest: as they are, and by their length."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).float()
    text, scores = f"Question: {row['question']}\nAnswer:", []
    for choice in row["choices"]:
        context, ids = tokenizer(text)["input_ids"], tokenizer(f"{text} {choice}")["input_ids"]
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(chances[at - 1, ids[at]]) for at in range(len(context), len(ids))))
    by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
    return scores.index(max(scores)), by_length.index(max(by_length))


@pytest.mark.skipif(not HAS_HARNESS, reason="lm-evaluation-harness does not go with dev.txt: see requirements/eval.txt")
def test_a_choice_task_of_ones_own_is_scored_without_a_network(tmp_path: Path, qwen: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": tmp_path / "cache"}
    settings = {"HF_MODEL_PATH": qwen, "TASKS_PATH": EXAMPLE, **offline}
    content, shown = evaluate(tmp_path, TASKS="capitals", DTYPE="fp32", **settings)
    rows = [json.loads(line) for line in (EXAMPLE / "capitals.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [likelier(qwen, row) for row in rows]
    for at, metric in enumerate(("acc", "acc_norm")):
        right = sum(pair[at] == row["answer"] for pair, row in zip(chosen, rows, strict=True))
        (found,) = [task for task in content["tasks"] if task["metric"] == metric]
        assert math.isclose(found["value"], right / len(rows)) and found["stderr"] > 0
        assert (found["task"], found["num_fewshot"], found["samples"]) == ("capitals", 0, len(rows))
    assert re.search(r"^capitals +0 +6 +acc +0\.\d{4} +0\.\d{4}$", shown, re.M)
    _, said = script("5_evaluate", 2, TASKS="capitols", **settings)
    assert f"TASKS: capitols is no task of lm-evaluation-harness, nor in {EXAMPLE}: correct the name" in said
