"""The main path through the scripts of cpu/, at TP=2 and PP=2: from jsonl to a model that transformers loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.ports import free_port
from tests.distributed.launch import run, steps, words
from tests.end_to_end.steps import chats, write_rows
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[2]
QUESTION = "<|im_start|>user\nWhat is 7+1?<|im_end|>\n<|im_start|>assistant\nIt is 8。<|im_end|>"


def script(name: str, **settings: object) -> str:
    """The output of a script of cpu/, which must succeed."""
    given = {key: str(value) for key, value in settings.items()}
    done = subprocess.run(
        ["bash", f"cpu/{name}.sh"], cwd=ROOT, env={**os.environ, "PYTHON": sys.executable, **given},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def hugging_face_loss(folder: Path, text: str) -> float:
    """transformers' mean loss over the tokens of `text`."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(AutoModelForCausalLM.from_pretrained(folder).float()(ids, labels=ids).loss)


@pytest.mark.lane
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_the_scripts_lead_from_jsonl_to_a_model_that_transformers_loads(tmp_path: Path, ckpt_format: str) -> None:
    qwen = tiny_qwen(tmp_path / "qwen", std=0.05, spread=0.05)
    rows, data, start, run_folder, trained = (
        tmp_path / name for name in ("rows.jsonl", "data", "start", "run", "trained")
    )
    write_rows(rows, chats(100))
    script("1_preprocess_sft", INPUT=rows, OUTPUT_PREFIX=data, TOKENIZER_PATH=qwen, WORKERS=1)
    own = {"TP": 2, "PP": 2, "CKPT_FORMAT": "torch"} if ckpt_format == "torch" else {}  # torch_dist fits any
    script(
        "2_convert_between_hf_megatron", CONVERT_TYPE="huggingface-to-megatron", LOAD_CHECKPOINT_PATH=qwen,
        SAVE_CHECKPOINT_PATH=start, **own,
    )  # fmt: skip
    log = script(
        "3_run_mcore_qwen", DATASET_PATH=data, LOAD_CHECKPOINT_PATH=start, SAVE_CHECKPOINT_PATH=run_folder, TP=2, PP=2,
        GPUS=4, TRAIN_MODE="finetune", SEQ_LENGTH=96, TRAIN_ITERS=10, GLOBAL_BATCH_SIZE=8, LR="3e-3", LOG_INTERVAL=1,
        CKPT_FORMAT=ckpt_format, MASTER_PORT=free_port(),
    )  # fmt: skip
    losses = [loss for _, loss, _ in steps(log)]
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0], losses
    assert "defaults of TRAIN_MODE=finetune: PACKING=true, LR_WARMUP_FRACTION=0.03, MIN_LR=0.0003" in log
    assert re.search(r"packing: a sample is a row of \d\.\d conversations on average", log)
    script(
        "2_convert_between_hf_megatron", CONVERT_TYPE="megatron-to-huggingface", LOAD_CHECKPOINT_PATH=run_folder,
        SAVE_CHECKPOINT_PATH=trained,
    )  # fmt: skip
    assert hugging_face_loss(trained, QUESTION) < hugging_face_loss(qwen, QUESTION)
    flags = {"hf_model_path": trained, "load_checkpoint_path": run_folder, "logits": "true"}
    assert "the models agree" in run("-m", "common.convert", "verify", *words(flags))
