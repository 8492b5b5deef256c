"""nvidia/recipes: what common.estimate writes today, each accepted by step 3, and fitting as its head says."""

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.estimate.gpus import find_gpu
from common.estimate.layouts import estimate
from common.model.shape.config import QwenConfig
from common.settings import add_options, from_namespace
from common.training.settings import TrainSettings
from tests import recipes

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QwenConfig]:
    """By the size, and of long rows the length."""
    found = {size: recipes.write_config(tmp_path_factory.mktemp(size), size) for size in recipes.SIZES}
    for length, (_, yarn) in recipes.LONG.items():
        found[length] = recipes.write_config(tmp_path_factory.mktemp(length), "7B", yarn)
    return found


def test_the_files_are_what_the_estimate_gives() -> None:
    found = {path.name: path.read_text() for path in recipes.FOLDER.glob("*.env")}
    assert found == dict(recipes.recipes())


def settings_of(path: Path) -> TrainSettings:
    """What `SETTINGS=path bash nvidia/3_...` passes to Python."""
    given = {"SETTINGS": str(path), "DATASET_PATH": "/d", "HF_MODEL_PATH": "/m", "SAVE_CHECKPOINT_PATH": "/s"}
    command = ["bash", str(ROOT / "nvidia" / "3_run_mcore_qwen.sh"), "--dry-run"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable, **given}, capture_output=True, text=True, check=True
    )
    printed = shlex.split((done.stdout + done.stderr).replace("\\\n", " "))
    parser = argparse.ArgumentParser()
    add_options(parser, TrainSettings)
    return from_namespace(TrainSettings, parser.parse_args(printed[printed.index("common.train") + 1 :]))


def test_step_3_accepts_each_and_it_fits(configs: dict[str, QwenConfig]) -> None:
    paths = sorted(recipes.FOLDER.glob("*.env"))
    with ThreadPoolExecutor(2) as pool:
        settings = list(pool.map(settings_of, paths))
    for path, each in zip(paths, settings, strict=True):
        size, task, *length, machine = path.stem.split("-")
        num_gpus, memory = machine.split("x")
        assert each.sizes.world_size == int(num_gpus) and bool(each.packing) == (task == "sft")
        assert (task == "sft") == (each.train_mode == "finetune")
        found = estimate(each, configs[length[0] if length else size], find_gpu(recipes.GPUS[memory]))
        assert found.fits == "yes" and f"{found.largest.peak / 2**30:.1f} GiB per GPU" in path.read_text(), path.name
