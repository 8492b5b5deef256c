"""Unusual surroundings: unprintable names, the user's own modules, other locales, missing permissions."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.ports import free_port
from tests.end_to_end.steps import ROOT, chats, files, write_rows
from tests.tiny import tiny_qwen

# Without the right of root to read what it may not.
AS_ANYONE = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def gbk(name: str) -> str:
    """`name` as a zip from Windows leaves it."""
    return os.fsdecode(name.encode("gbk"))


def script(folder: Path, name: str, expect: int = 0, **settings: object) -> str:
    """The output of a script of cpu/ that is started in `folder`."""
    given = {"PYTHON": sys.executable, **{key: str(value) for key, value in settings.items()}}
    done = subprocess.run(
        ["bash", str(ROOT / f"cpu/{name}.sh")], cwd=folder, env={**os.environ, **given},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == expect and "Traceback" not in done.stdout, done.stdout[-6000:]
    return done.stdout


def python_310(folder: Path) -> Path:
    """A Python that, as 3.10, does not know PYTHONSAFEPATH."""
    path = folder / "python310"
    path.write_text(f'#!/bin/sh\nexec env -u PYTHONSAFEPATH {sys.executable} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def test_all_steps_work_by_relative_names_in_gbk_beside_modules_of_the_users_own(tmp_path: Path) -> None:
    python = python_310(tmp_path)
    work = tmp_path / gbk("工作")
    for name in ("common/__init__.py", "argparse.py", "logging.py", "torch.py"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("raise SystemExit('this is not the one that is meant')\n")
    tiny_qwen(tmp_path / "qwen").rename(work / gbk("模型"))
    (write_rows(tmp_path / "rows", [*chats(40), {"bad": 1}])).rename(work / gbk("数据.jsonl"))
    rows, data, model, start, run, back = map(gbk, ("数据.jsonl", "输出", "模型", "起点", "训练", "导出"))
    output = script(
        work, "1_preprocess_sft", INPUT=rows, OUTPUT_PREFIX=data, TOKENIZER_PATH=model, ON_ERROR="skip", WORKERS=1,
        PYTHON=python,
    )  # fmt: skip
    assert "\\udc" in output
    assert json.loads((work / f"{data}.rejects").read_text(encoding="utf-8"))["file"] == rows
    script(
        work, "2_convert_between_hf_megatron", CONVERT_TYPE="huggingface-to-megatron", LOAD_CHECKPOINT_PATH=model,
        SAVE_CHECKPOINT_PATH=start, CKPT_FORMAT="torch_dist", PYTHON=python,
    )  # fmt: skip
    script(
        work, "3_run_mcore_qwen", DATASET_PATH=data, LOAD_CHECKPOINT_PATH=start, SAVE_CHECKPOINT_PATH=run, GPUS=1,
        TRAIN_MODE="finetune", SEQ_LENGTH=96, TRAIN_ITERS=1, GLOBAL_BATCH_SIZE=2, MASTER_PORT=free_port(),
        PYTHON=python,
    )  # fmt: skip
    script(
        work, "2_convert_between_hf_megatron", CONVERT_TYPE="megatron-to-huggingface", LOAD_CHECKPOINT_PATH=run,
        SAVE_CHECKPOINT_PATH=back, PYTHON=python,
    )  # fmt: skip
    assert (work / back / "model.safetensors").is_file()


def test_a_locale_of_another_encoding_changes_nothing_that_is_written(tmp_path: Path) -> None:
    subprocess.run(["localedef", "-i", "zh_CN", "-f", "GBK", tmp_path / "zh_CN.GBK"], check=False, capture_output=True)
    tiny_qwen(tmp_path / "模型")
    write_rows(tmp_path / "数据.jsonl", [*chats(20), {"bad": 1}])
    written = {}
    for name in ("C", "zh_CN.GBK"):
        (tmp_path / name[:1]).mkdir()
        settings = {"INPUT": "数据.jsonl", "OUTPUT_PREFIX": f"{name[:1]}/输出", "TOKENIZER_PATH": "模型", "WORKERS": 1}
        output = script(tmp_path, "1_preprocess_sft", LC_ALL=name, LOCPATH=tmp_path, ON_ERROR="skip", **settings)
        assert "setlocale" not in output
        written[name] = files(tmp_path / name[:1])
    assert written["C"] and written["C"] == written["zh_CN.GBK"]


@contextmanager
def forbidden(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    yield
    path.chmod(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny_qwen(folder / "qwen")
    write_rows(folder / "rows.jsonl", chats(20))
    script(folder, "1_preprocess_sft", INPUT="rows.jsonl", OUTPUT_PREFIX="data", TOKENIZER_PATH="qwen", WORKERS=1)
    script(
        folder, "2_convert_between_hf_megatron", CONVERT_TYPE="huggingface-to-megatron", LOAD_CHECKPOINT_PATH="qwen",
        SAVE_CHECKPOINT_PATH="mega",
    )  # fmt: skip
    (folder / "closed").mkdir()
    return folder


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AS_ANYONE, sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "KIT_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


SHOW = "common.preprocess show --data data --tokenizer-path qwen"
EXPORT = "common.convert megatron-to-hf --load-checkpoint-path mega --save-checkpoint-path new"
IMPORT = "common.convert hf-to-megatron --load-checkpoint-path qwen --save-checkpoint-path new2"
VERIFY = "common.convert verify --load-checkpoint-path mega --hf-model-path qwen --report closed/report.json"
TRAIN = (
    "common.train --dataset-path data --hf-model-path qwen --save-checkpoint-path run --train-iters 1 --check"
    " --train-mode finetune --seq-length 96 --transformer-impl local"
)


@pytest.mark.parametrize(
    ("path", "mode", "command"),
    [
        ("qwen/tokenizer.json", 0, SHOW),
        ("data_text_document.bin", 0, SHOW),
        ("data.json", 0, TRAIN),
        ("qwen/config.json", 0, TRAIN),
        ("mega/latest_checkpointed_iteration.txt", 0, EXPORT),
        ("qwen/model.safetensors", 0, IMPORT),
        ("qwen", 0, "common.estimate --gpu H100 --hf-model-path qwen"),
        ("closed", 0o555, "common.demo make --folder closed/sample"),
        ("closed", 0o555, VERIFY),
    ],
)
def test_missing_permissions_are_one_line_with_the_path(made: Path, path: str, mode: int, command: str) -> None:
    with forbidden(made / path, mode):
        done = python(made, *command.split())
    assert done.returncode == 2 and done.stdout == "", done
    (message,) = (line for line in done.stderr.splitlines() if "Permission denied" in line)
    assert (
        done.stderr.endswith(f"{message}\n")
        and message.startswith("error: ")
        and path in message
        and "chmod" in message
    )


def test_a_python_without_packages_prints_how_to_install_them(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    for command in ("preprocess", "convert", "train", "demo", "logits"):
        done = subprocess.run(
            [tmp_path / "bare/bin/python", "-m", f"common.{command}", "--help"], cwd=tmp_path, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "KIT_PLATFORM": "metax"}, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert " lacks " in done.stderr and "bash common/shell/setup_venv.sh" in done.stderr
        assert "bash metax/doctor.sh" in done.stderr


def test_a_package_of_another_version_is_not_called_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import common, numpy.renamed"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert " has a numpy of another version, without numpy.renamed: run bash common/shell/" in done.stderr
