"""What a run records in its folder and sends to Weights & Biases, also where it fails and where it resumes."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.training.state.step_times import FORWARD_BACKWARD, OPTIMIZER, READING, REDUCTION
from common.training.tracking.records import read_metrics, read_run_record
from tests.distributed.launch import ROOT, forked, run, steps, train_forked, words
from tests.tiny import TEXTS, tiny_qwen


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracking")
    qwen, rows = tiny_qwen(folder / "qwen"), folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} {TEXTS[i % 4]}"}) + "\n" for i in range(100)), encoding="utf-8")
    given = {"input": rows, "output_prefix": folder / "data", "tokenizer_path": qwen, "workers": 1}
    run("-m", "common.preprocess", "pretrain", *words(given))
    return folder


@pytest.mark.parametrize("service", ["wandb", "swanlab"])
@pytest.mark.parametrize(
    ("name", "flags", "code", "ended"),
    [("ends", {}, 0, 0), ("fails", {"lr": 1e30, "min_lr": 1e30, "max_bad_steps": 1}, 2, 1)],
)
def test_the_figures_and_how_the_run_ended_are_sent(
    work: Path, service: str, name: str, flags: dict[str, Any], code: int, ended: int
) -> None:
    name = f"{service}_{name}"
    settings = {
        "hf_model_path": work / "qwen", "dataset_path": work / "data", "save_checkpoint_path": work / name,
        "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32", "log_interval": 1,
        "split": "80,20,0", "eval_interval": 2, "eval_iters": 1, "train_iters": 3, "lr": 1e-3,
        f"{service}_project": "kit", f"{service}_mode": "offline", f"{service}_exp_name": name,
        f"{service}_save_path": work, **flags,
    }  # fmt: skip
    more = {"PYTHONPATH": f"{ROOT / 'tests' / 'stubs' / service}:{ROOT}"}
    log = forked(1, "common.train", words(settings), expect=code, more=more)
    first, *figures, last = map(json.loads, (work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    run_id = read_run_record(work / name)[f"{service}_run_id"]
    expected = {"project": "kit", "mode": "offline", "id": run_id, "resume": "allow", "lr": settings["lr"]}
    assert first == expected and last == {"exit_code": ended}
    logged = [line for line in figures if "loss" in line]
    assert [(line["step"], f"{line['loss']:.6f}") for line in logged[:1]] == [(1, f"{steps(log)[0][1]:.6f}")]
    assert {"grad_norm", "learning_rate", "tokens_per_s", "tflops_per_gpu", "ms_per_iteration"} <= logged[0].keys()
    if code:
        assert "and none of them was saved" in log and len(logged) == 2 and math.isnan(logged[1]["loss"])
    else:
        assert [line["step"] for line in figures if "validation_loss" in line] == [2, 3] and len(logged) == 3


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's own reading of the event files: name, iteration, value."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}


def test_a_run_describes_itself_in_its_folder_over_all_its_starts(work: Path) -> None:
    folder = work / "records"
    settings = {
        "hf_model_path": work / "qwen", "dataset_path": work / "data", "save_checkpoint_path": folder,
        "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "log_interval": 1, "save_interval": 2,
        "split": "80,20,0", "eval_interval": 2, "eval_iters": 1, "train_iters": 6, "lr": 1e-3, "gpus": 2,
    }  # fmt: skip
    log = train_forked(**settings, exit_interval=4)
    shutil.rmtree(folder / "iter_0000004")  # as if it had been killed before that was saved
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 5, "lo')
    again = train_forked(**settings)

    lines = read_metrics(folder)
    losses = {line["iteration"]: line["loss"] for line in lines if "loss" in line}
    logged = steps(log)[:2] + steps(again)
    assert [*losses] == [1, 2, 3, 4, 5, 6] == [number for number, _, _ in logged]
    assert all(f"{losses[number]:.6f}" == f"{loss:.6f}" for number, loss, _ in logged)
    assert [line["iteration"] for line in lines if "validation_loss" in line] == [2, 4, 6]
    trained = [line for line in lines if "loss" in line]
    assert all(line["supervised_tokens_per_s"] == pytest.approx(line["tokens_per_s"]) for line in trained)
    for line in trained[1:4] + trained[5:]:  # steps without the first's allocations
        parts = [line[f"{part}_ms"] for part in (FORWARD_BACKWARD, REDUCTION, OPTIMIZER)]
        assert min(parts) > 0 and 0.5 < sum(parts) / line["ms_per_iteration"] <= 1
        assert 0 < line[f"{READING}_ms"] < line[f"{FORWARD_BACKWARD}_ms"]
    assert log.count("ms a step, rank 0: forward-backward ") == 1 == again.count("ms a step, rank 0: ")
    assert trained[-1]["consumed_samples"] == 24 and trained[4]["saving_s"] > 0 and trained[4]["evaluation_s"] > 0
    assert [line["start"] for line in trained] == [0, 0, 1, 1, 1, 1]

    events = read_events(folder / "tensorboard")
    assert {number: pytest.approx(value) for number, value in events["loss"].items()} == losses
    assert [*events["validation_loss"]] == [2, 4, 6]

    first, second = read_run_record(folder)["starts"]
    assert first["iteration"] == 0 and first["end"]["iteration"] == 4 and second["iteration"] == 2
    assert (first["start"]["kind"], second["start"]["kind"]) == ("random", "resume")
    assert second["end"]["reason"] == "complete" and second["end"]["iteration"] == 6
    assert second["settings"]["lr"] == 1e-3 and second["world_size"] == 2 and second["versions"]["torch"]

    text = (folder / "log.txt").read_text(encoding="utf-8")
    assert text.count("data: ") == 2 and re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d iteration 6/6 ", text, re.MULTILINE
    )
