"""A run on a GPU with nvidia/'s own defaults: stopped, resumed, exported, killed, without holding on to the GPU.

DETERMINISTIC=true is set where bits are compared: the kernels used otherwise may differ from run to run.
"""

import gzip
import json
import os
import pickle
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.training.state.step_times import FORWARD_BACKWARD, OPTIMIZER, REDUCTION
from common.training.tracking.records import read_metrics
from tests.conversion import to_hf, to_megatron
from tests.distributed.launch import run, words
from tests.distributed.user import ENDLESS, Run, wait_for
from tests.tiny import TEXTS, tiny_qwen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPUS = min(2, torch.cuda.device_count())
LAYOUTS = (
    {"one": {"GPUS": 1}} if GPUS < 2 else {"dp2": {"GPUS": 2}, "tp2": {"GPUS": 2, "TP": 2}, "pp2": {"GPUS": 2, "PP": 2}}
)
LOSS = re.compile(r"iteration (\d+)/\d+ +(\S+) +(\S+) ")  # loss, grad norm


class GpuRun(Run):
    vendor = "nvidia"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Qwen2.5-0.5B's width and head size with six layers (80 M parameters), and its data."""
    folder = tmp_path_factory.mktemp("life")
    shape = {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 6, "num_attention_heads": 14,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    tiny_qwen(folder / "qwen", std=0.02, **shape)
    rows = (json.dumps({"text": f"{i} " + TEXTS[i % 4] * (20 + i % 30)}) + "\n" for i in range(2000))
    (folder / "rows.jsonl").write_text("".join(rows))
    flags = {"input": folder / "rows.jsonl", "output_prefix": folder / "text", "tokenizer_path": folder / "qwen"}
    run("-m", "common.preprocess", "pretrain", *words({**flags, "workers": 1}))
    to_megatron(folder / "qwen", folder / "start", ckpt_format="torch_dist", dtype="bf16")
    return folder


def settings(work: Path, name: str, layout: dict[str, int], **more: Any) -> dict[str, Any]:
    paths = {"DATASET_PATH": work / "text", "LOAD_CHECKPOINT_PATH": work / "start", "SAVE_CHECKPOINT_PATH": work / name}
    sizes = {"TP": 1, "PP": 1, "SEQ_LENGTH": 2048, "MICRO_BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 8, "LR": 1e-4}
    return {**paths, **sizes, **layout, "SAVE_INTERVAL": 5, "EVAL_INTERVAL": 7, "EVAL_ITERS": 2, **more}


def losses(log: str) -> dict[str, tuple[str, str]]:
    return {i: (loss, norm) for i, loss, norm in LOSS.findall(log)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_stopped_run_resumes_and_exports_the_bits_of_its_step(work: Path, layout: dict[str, int]) -> None:
    name = "_".join(f"{key}{value}" for key, value in layout.items())
    same = {"DETERMINISTIC": "true", "TRAIN_ITERS": 400}
    # Saved from a copy in the host's memory here, and straight from the GPU by the runs that it is held against.
    stopped = GpuRun(settings(work, name, layout, **same, ASYNC_SAVE="true"), work / f"{name}.log")
    stopped.wait_for("saved " + str(work / name / "iter_0000005"), 200)
    stopped.process.send_signal(signal.SIGTERM)
    first = stopped.end(75, 100)
    done = stopped.tracker()
    to_hf(work / name, work / f"{name}_hf")
    more = {**same, "EXIT_INTERVAL": done + 4}
    rest = GpuRun(settings(work, name, layout, **more), work / f"{name}_rest.log").end(0, 200)
    uninterrupted = GpuRun(settings(work, f"{name}_whole", layout, **more), work / f"{name}_whole.log").end(0, 200)
    assert losses(first) | losses(rest) == losses(uninterrupted) and len(losses(rest)) == 4
    more["EXIT_INTERVAL"] = done
    GpuRun(settings(work, f"{name}_at", layout, **more), work / f"{name}_at.log").end(0, 200)
    to_hf(work / f"{name}_at", work / f"{name}_at_hf")
    expected, found = (load_file(work / each / "model.safetensors") for each in (f"{name}_at_hf", f"{name}_hf"))
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def on_the_gpu() -> set[int]:
    """The processes that have a CUDA context."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    return set(map(int, subprocess.run(query, capture_output=True, check=True).stdout.split()))


def used_mib() -> int:
    completed = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True
    )
    return max(map(int, completed.stdout.split()))


@pytest.mark.parametrize(
    ("layout", "asynchronous", "limit_s"),
    [
        ({"GPUS": 1}, "false", 5),
        ({"GPUS": 1}, "true", 5),
        # The other rank's streams wait for this one's copies, and its process for them.
        pytest.param({"GPUS": 2, "TP": 2}, "true", 15, marks=pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")),
    ],
    ids=["one", "one_async", "tp2_async"],
)
def test_a_killed_rank_gives_the_gpu_back_at_once(
    work: Path, layout: dict[str, int], asynchronous: str, limit_s: float
) -> None:
    before, name = used_mib(), f"killed_{len(layout)}_{asynchronous}"
    run = GpuRun(settings(work, name, layout, TRAIN_ITERS=ENDLESS, ASYNC_SAVE=asynchronous), work / f"{name}.log")
    run.wait_for("saved " + str(work / name / "iter_0000005"), 200)
    ranks = run.ranks()
    reader, killed = ranks[0], ranks[-1]  # with TP the first one has the data workers, for all
    children = {child.pid for child in reader.children(recursive=True)}
    assert len(children) >= 4 and {rank.pid for rank in ranks} <= on_the_gpu() and not children & on_the_gpu()
    assert used_mib() > before + 1000
    os.kill(killed.pid, signal.SIGKILL)
    began = time.monotonic()
    wait_for(lambda: used_mib() <= before + 100, 4 * limit_s)
    print(f"GPU given back {time.monotonic() - began:.1f} s after SIGKILL")
    assert time.monotonic() - began < limit_s
    run.end(1, 30)


def test_a_run_is_looked_into(work: Path) -> None:
    """Its trace has kernels, its snapshot allocations with stacks, and the parts of a step fill it."""
    more = {"TRAIN_ITERS": 8, "LOG_INTERVAL": 1, "EVAL_INTERVAL": 0, "PROFILE": "4-5", "MEMORY_SNAPSHOT": "true"}
    log = GpuRun(settings(work, "inside", {"GPUS": 1}, **more), work / "inside.log").end(0, 200)
    assert "cannot be written" not in log
    folder = work / "inside" / "profile"
    events = json.loads(gzip.decompress((folder / "steps_4-5_rank_0.json.gz").read_bytes()))["traceEvents"]
    assert len([event for event in events if event.get("cat") == "kernel"]) > 100
    snapshot = pickle.loads((folder / "memory_step_5_rank_0.pickle").read_bytes())
    frames = [
        frame["filename"] for block in snapshot["segments"] for each in block["blocks"] for frame in each["frames"]
    ]
    assert any(name.endswith("training_state.py") for name in frames)  # what the model was built by
    for line in read_metrics(work / "inside")[5:]:
        parts = [line[f"{part}_ms"] for part in (FORWARD_BACKWARD, REDUCTION, OPTIMIZER)]
        assert min(parts) > 0 and 0.8 < sum(parts) / line["ms_per_iteration"] < 1.02
