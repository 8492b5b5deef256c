"""Old scripts become settings that the scripts here accept, and the values arrive in the command they would run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from tests.distributed.launch import run
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "old_scripts"
# The arguments of Pai-Megatron-Patch's README, for its two examples.
PAI = (
    "dsw 0.5B 1 8 1e-5 1e-6 128 128 bf16 1 1 1 true true true {sft} false false 100000 /data/w_text_document"
    " /data/w_text_document /ckpt/mcore 10000 100 /out"
)


def adopt(script: Path, *arguments: str | Path, status: int = 0) -> str:
    """The output of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "common.adopt", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def arrived(settings: Path, script: str = "nvidia/3_run_mcore_qwen.sh") -> dict[str, str]:
    """The flags of the Python command that the script would run with the settings."""
    done = subprocess.run(
        ["bash", script, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "SETTINGS": str(settings)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    words = words[words.index("-m") + 2 :]
    words = words[words[0][:2] != "--" :]  # a subcommand, in steps 1 and 2
    values = dict(zip(words[::2], words[1::2], strict=True))
    return {name.removeprefix("--").replace("-", "_").upper(): value for name, value in values.items()}


def check(settings: Path, wanted: str, script: str = "nvidia/3_run_mcore_qwen.sh") -> None:
    found = arrived(settings, script)
    for word in shlex.split(wanted):
        name, _, value = word.partition("=")
        assert found.get(name) == value, (name, found.get(name), value)


def unfolded(text: str) -> str:
    """The text without the line breaks of its comments."""
    return " ".join(text.replace("\n#", "").split())


def everything(script: str, output: str, flags: list[str]) -> None:
    """Every assignment and flag of the old script is somewhere in the file; the count at its end is right."""
    names = set(re.findall(r"^\s*(?:export )?([A-Za-z_]\w*)\+?=", script, re.M))
    skipped = set()
    for first, last in re.findall(r"^# - lines? (\d+)(?: to (\d+))?: not taken", output, re.M):
        for line in script.splitlines()[int(first) - 1 : int(last or first)]:
            skipped |= set(re.findall(r"^\s*([A-Za-z_]\w*)=", line))
    assert [name for name in names - skipped if not re.search(rf"\b{name}=", output)] == []
    assert [flag for flag in flags if not re.search(rf"{flag}\b", output)] == []
    counted = {kind: int(number) for kind, number in re.findall(r"^# ([\w:, ]+) \((\d+)\):$", output, re.M)}
    settings = len(re.findall(r"^[A-Z0-9_]+=", output, re.M))
    numbers = [int(number) for number in re.findall(r"\d+", output.splitlines()[-1])]
    assert numbers[2:] == [
        settings, counted.get("Problems: fix or accept each", 0), counted["Changed in meaning"],
        counted["Not needed here"],
    ]  # fmt: skip
    assert numbers[0] == len(set(flags))


def test_the_old_kits_script_trains_here_with_the_same_values(tmp_path: Path) -> None:
    env = tmp_path / "my.env"
    said = adopt(OLD / "old_kit.sh.txt", "--output", env)
    check(
        env,
        "DATASET_PATH=/data/sft_imported LOAD_CHECKPOINT_PATH=/ckpt/start SAVE_CHECKPOINT_PATH=/ckpt/run"
        " TRAIN_MODE=finetune IS_INITIAL_RUN=auto SPLIT=98,2,0 SEQ_LENGTH=2048 TP=2 PP=2 CP=1 GPUS=8 MASTER_PORT=22222"
        " MICRO_BATCH_SIZE=2 GLOBAL_BATCH_SIZE=16 TRAIN_ITERS=29002 LR=6.5e-5 MIN_LR=2.5e-6 LR_WARMUP_ITERS=0"
        " WEIGHT_DECAY=0.01 PRECISION=bf16 RECOMPUTE=selective ASYNC_SAVE=true SAVE_INTERVAL=100"
        " EVAL_ITERS=50 LOG_INTERVAL=100 WANDB_PROJECT=sft WANDB_EXP_NAME=first WANDB_SAVE_PATH=/home/wandb_logs",
    )
    assert "import-legacy --input /data/sft --output-prefix /data/sft_imported --tokenizer-path MODEL" in said
    text = unfolded(env.read_text())
    for part in (
        "3 * 154678 / 16 = 29002", "EPOCHS=3 instead of TRAIN_ITERS", "131072: given again: the last one, 32768",
        "left on, the old flag lost them", "ROLES=alpaca", "exit code 2; it was 0", "ENV=$1: no flag",
    ):  # fmt: skip
        assert part in text, part
    script = (OLD / "old_kit.sh.txt").read_text()
    flags = re.findall(r"^\s+(--(?!ckpt-convert)[\w-]+)", script, re.M)
    everything(script, env.read_text(), [flag.replace("_", "-") for flag in flags])


def test_the_old_kits_conversion_becomes_ours(tmp_path: Path) -> None:
    env = tmp_path / "my.env"
    adopt(OLD / "old_kit.sh.txt", "--set", "TRAIN_OR_CONVERT_CKPT=convert", "--vendor", "metax", "--output", env)
    wanted = "TRAIN_OR_CONVERT_CKPT=convert LOAD_CHECKPOINT_PATH=/ckpt/start SAVE_CHECKPOINT_PATH=/ckpt/torch TP=2"
    check(env, f"{wanted} TRANSFORMER_IMPL=local", "metax/3_run_mcore_qwen.sh")
    assert "Megatron-LM added a folder torch/" in env.read_text()


def test_pais_example_of_pretraining(tmp_path: Path) -> None:
    env = tmp_path / "my.env"
    said = adopt(OLD / "pai.sh.txt", "--args", PAI.format(sft="false"), "--output", env)
    check(
        env,
        "DATASET_PATH=/data/w LOAD_CHECKPOINT_PATH=/ckpt/mcore SAVE_CHECKPOINT_PATH=/out/checkpoint/tp-1-pp-1"
        " SPLIT=99,1,0 TRAIN_MODE=pretrain SEQ_LENGTH=128 TP=1 PP=1 TRAIN_ITERS=9 LR_WARMUP_ITERS=0 LR=1e-5"
        " MIN_LR=1e-6 ADAM_BETA2=0.95 WEIGHT_DECAY=0.1 GLOBAL_BATCH_SIZE=8 SAVE_OPTIMIZER=false TENSORBOARD=true"
        " LOG_INTERVAL=1 RECOMPUTE=none",
    )
    assert "--nproc-per-node `python -c" in said and "--no-save-optim: such a run can never be resumed" in said
    text = unfolded(env.read_text())
    assert "10000 / 8 / 128 = 9" in text and "100 / 8 / 128 = 0; the script rounds it down to 0" in text
    assert "MP_VP is set by no line" in text
    flags = re.findall(r"(--[\w-]+) ", _command(PAI.format(sft="false")))
    everything((OLD / "pai.sh.txt").read_text(), env.read_text(), flags)


def _command(arguments: str) -> str:
    """The command line that bash gives pai.sh's torchrun, with dashes for underscores in its flags."""
    script = (OLD / "pai.sh.txt").read_text().replace("mkdir -p", ": ").replace("find -L", ": ").replace("| xargs", "#")
    script = script.replace('`python -c "import torch; print(torch.cuda.device_count())"`', "8")
    done = subprocess.run(
        ["bash", "-c", f"torchrun() {{ :; }}\n{script}", "pai.sh.txt", *arguments.split()],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return re.sub(r"--\w+", lambda found: found[0].replace("_", "-"), done.stdout) + " "


def test_pais_example_of_fine_tuning_and_its_rows(tmp_path: Path) -> None:
    env = tmp_path / "my.env"
    adopt(OLD / "pai.sh.txt", "--args", PAI.format(sft="true"), "--output", env)
    check(env, "TRAIN_MODE=finetune TRAIN_ITERS=10000 LR_WARMUP_ITERS=100 DATASET_PATH=/data/w_imported")
    said = adopt(OLD / "pai.sh.txt", "--args", PAI.format(sft="true"), "--set", "MP_DATASET_TYPE=raw", "--output", env)
    assert "1_preprocess_sft.sh" in said
    check(env, "TRAIN_MODE=finetune VALID_DATASET_PATH=/data/w DATASET_PATH=/data/w")


def test_pais_script_without_its_arguments_says_which_are_missing() -> None:
    said = adopt(OLD / "pai.sh.txt")
    assert "whether [ $ENV = dsw ] holds is not known here" in unfolded(said)
    assert "--micro-batch-size $3: its value is known only when the script runs" in " ".join(
        said.replace("\n#", "").split()
    )


def test_megatrons_script_names_what_is_no_qwen_and_what_is_unknown(tmp_path: Path) -> None:
    env = tmp_path / "my.env"
    said = adopt(OLD / "megatron.sh.txt", "--args", "/ckpt /data/a_text_document", "--output", env)
    check(
        env,
        "'DATASET_PATH=0.7 /data/a 0.3 /data/other' SAVE_CHECKPOINT_PATH=/ckpt LOAD_CHECKPOINT_PATH=/ckpt TP=4 PP=2"
        " VPP=6 GPUS=8 NNODES=2 MASTER_ADDR=node0 TRAIN_ITERS=2000 LR_WARMUP_ITERS=100 LR_DECAY_STYLE=linear MIN_LR=0.0"
        " SPLIT=969,30,1 EVAL_INTERVAL=1000 EVAL_ITERS=100 LOG_INTERVAL=100 PRECISION=bf16 WEIGHT_DECAY=0.1",
    )
    for part in (
        "--swiglu not given", "--normalization LayerNorm", "learned_absolute",
        "--attention-dropout 0.1 (the old program's",
        "--num-experts 8: no mixture", "--rampup-batch-size 16 16 5859375", "fp16 is not trained here", "${MORE_ARGS}",
        "--node-rank ${NODE_RANK}",
        "--recompute-num-layer 2: this flag is not known here: is it --recompute-num-layers?",
    ):  # fmt: skip
        assert part in said, part
    assert "1024000 / GLOBAL_BATCH_SIZE=512 = 2000" in unfolded(env.read_text())


def test_scripts_of_the_other_steps_name_ours(tmp_path: Path) -> None:
    env, old = tmp_path / "my.env", tmp_path / "old.sh"
    old.write_text(
        "python /w/toolkits/sft_data_preprocessing/build_idxmap_sft_dataset.py --input /d/rows.jsonl --seq-length 111"
        " \\\n  --patch-tokenizer-type Qwen2Tokenizer --output-prefix /d/out --load /m/Qwen --workers 8"
        " --partitions 1\n"
    )
    adopt(old, "--output", env)
    wanted = "INPUT=/d/rows.jsonl OUTPUT_PREFIX=/d/out TOKENIZER_PATH=/m/Qwen SEQ_LENGTH=111 WORKERS=8"
    check(env, wanted, "nvidia/1_preprocess_sft.sh")
    assert "SETTINGS=my.env bash nvidia/1_preprocess_sft.sh" in env.read_text() and "import-legacy" in env.read_text()
    old.write_text(
        "python /w/preprocess_data_megatron.py --input /d --json-keys text --output-prefix /d/out --load"
        " /m/Qwen --append-eod --keep-sequential-samples --patch-tokenizer-type Qwen2Tokenizer --workers 8"
        " --partitions 2\n"
    )
    adopt(old, "--output", env)
    check(
        env, "INPUT=/d OUTPUT_PREFIX=/d/out TOKENIZER_PATH=/m/Qwen APPEND_EOD=true", "nvidia/1_preprocess_pretrain.sh"
    )
    old.write_text(
        "args=(--convert-checkpoint-from-megatron-to-transformers --hf-ckpt-path /m/Qwen)\n"
        "torchrun --nproc_per_node 1 /w/hf2mcore_qwen2_dense_and_moe_gqa.py --load /c --save /h --num-layers 28 \\\n"
        "  --target-tensor-model-parallel-size 2 --save-safetensors --bf16 --swiglu ${args[@]}\n"
    )
    adopt(old, "--output", env)
    wanted = "LOAD_CHECKPOINT_PATH=/c SAVE_CHECKPOINT_PATH=/h HF_MODEL_PATH=/m/Qwen DTYPE=bf16"
    check(env, wanted, "nvidia/2_convert_between_hf_megatron.sh")
    assert "in the old converter this flag turned them off" in unfolded(env.read_text())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo hello\n", "holds no command that preprocesses, converts or trains"),
        ("sh run_mcore_qwen.sh dsw 0.5B 1\n", "adopt that one, with --args 'dsw 0.5B 1'"),
        ("\0", "is no text"),
        ("if [ $X = 1 ]; then torchrun pretrain_gpt.py; fi", "line 1 was not read"),
    ],
)
def test_a_file_that_holds_no_step_is_refused(tmp_path: Path, text: str, said: str) -> None:
    old = tmp_path / "old.sh"
    old.write_text(text)
    assert said in adopt(old, status=2)
    assert "error: " in adopt(tmp_path / "missing.sh", status=2)


def test_adopted_settings_train_on_imported_data(tmp_path: Path) -> None:
    """The whole road: the old kit's data and script, import-legacy, and a run of two steps on a CPU."""
    qwen = tiny_qwen(tmp_path / "hf")
    seq_length, prefix = 16, tmp_path / "old"
    with IndexedDatasetBuilder(Path(f"{prefix}_text_document"), np.dtype(np.int32)) as writer:
        for row in range(60):
            tokens = np.full(seq_length, 5, np.int32)
            tokens[:10] = np.arange(row, row + 10)
            labels = np.full(seq_length, -100, np.int32)
            labels[4:9] = tokens[5:10]  # shifted by one; the last position has none
            tokens[9] = -1 - tokens[9]  # marks the end of a conversation
            writer.add_document(np.concatenate([tokens, labels]))
    old, env = tmp_path / "old.sh", tmp_path / "my.env"
    script = (OLD / "old_kit.sh.txt").read_text().replace("/data/sft_text_document", f"{prefix}_text_document")
    script = script.replace("/ckpt/run", str(tmp_path / "run")).replace("--load $LOAD_CHECKPOINT_PATH", "")
    script = script.replace("--seq-length 2048", f"--seq-length {seq_length}").replace(
        "--nproc_per_node 8", "--nproc_per_node 1"
    )
    script = re.sub(r"-model-parallel-size 2", "-model-parallel-size 1", script).replace("=154678", "=11")
    script = re.sub(r"--wandb\S+ \S+|--async-save|--master_port 22222", "", script)
    old.write_text(script)
    adopt(old, "--vendor", "cpu", "--hf-model-path", qwen, "--output", env)
    words = ["--input", str(prefix), "--output-prefix", f"{prefix}_imported", "--tokenizer-path", str(qwen)]
    run("-m", "common.preprocess", "import-legacy", *words)
    done = subprocess.run(
        ["bash", "cpu/3_run_mcore_qwen.sh"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "SETTINGS": str(env)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
