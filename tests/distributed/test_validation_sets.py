"""Validation sets by name: the loss of each is that of all of its samples, at every layout, and so is what follows."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Qwen2ForCausalLM

from common.data.dataset.builder import build_dataset
from common.data.dataset.manifest import resolve
from common.report.runs import read_run, summary
from common.training.tracking.records import read_metrics
from tests.distributed.launch import run, words
from tests.distributed.user import step3, step3_forked

SIZES = {"law": 9, "general": 30}  # neither a multiple of GLOBAL_BATCH_SIZE=8, nor of the 4 samples that run at once
LOSS = re.compile(r"(validation at iteration (\d+)|  \S+) +loss ([\d.]+)  .*?  ((?:all )?\d+) samples(.*)")


@pytest.fixture(scope="module")
def sets(work: Path) -> str:
    """VALID_DATASET_PATH of two sets, one in a folder with a space, whose answers differ much in length."""
    (work / "b c").mkdir()
    for name, size in SIZES.items():
        rows = [{"instruction": "", "input": f"{name} {i}?", "output": f"{i}" * (1 + i % 9)} for i in range(size)]
        path = work / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"input": path, "output_prefix": work / "b c" / name, "tokenizer_path": work / "qwen", "workers": 1}
        run("-m", "common.preprocess", "sft", *words(given))
    return " ".join(f"{name} '{work}/b c/{name}'" for name in SIZES)


def settings(work: Path, name: str, sets: str, **more: Any) -> dict[str, Any]:
    return {
        "TRAIN_MODE": "finetune", "DATASET_PATH": work / "sft", "LOAD_CHECKPOINT_PATH": work / "start",
        "VALID_DATASET_PATH": sets, "SAVE_CHECKPOINT_PATH": work / name, "SEQ_LENGTH": 96, "EVAL_INTERVAL": 1,
        "TRAIN_ITERS": 1, "PACKING": "false", **more,
    }  # fmt: skip


def hugging_face(work: Path) -> dict[str, float]:
    """Hugging Face's loss of each set over its supervised tokens, and of all of their tokens under ""."""
    model, sums = Qwen2ForCausalLM.from_pretrained(work / "qwen").float(), torch.zeros(0, 2)
    for name, size in SIZES.items():
        samples = build_dataset(resolve(str(work / "b c" / name)), train_mode="finetune", seq_length=96, seed=1)
        assert samples.samples_per_epoch == size
        rows = [samples[i] for i in range(size)]
        tokens, labels, mask = (
            torch.stack([torch.from_numpy(row[key]) for row in rows]) for key in ("tokens", "labels", "loss_mask")
        )
        with torch.no_grad():
            logits = model(tokens).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        sums = torch.cat([sums, torch.tensor([[(losses * mask.flatten()).sum(), mask.sum()]])])
    means = (sums[:, 0] / sums[:, 1]).tolist()
    return {"": float(sums[:, 0].sum() / sums[:, 1].sum()), **dict(zip(SIZES, means, strict=True))}


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"GPUS": 1},
    "dp2": {"GPUS": 2},
    "dp2_rows_of_one": {"GPUS": 2, "MICRO_BATCH_SIZE": 1},
    "tp2_pp2": {"TP": 2, "PP": 2, "GPUS": 4},
    "pp2_vpp2": {"PP": 2, "VPP": 2, "GPUS": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_losses_are_hugging_faces_over_all_samples_of_each_set(work: Path, sets: str, name: str) -> None:
    # The weights are those that Hugging Face has, and every set is taken whole however few EVAL_ITERS are.
    still = {"LR": 0, "MIN_LR": 0, "EVAL_ITERS": 1}
    log = step3_forked(settings(work, name, sets, **still, **LAYOUTS[name]))
    expected = hugging_face(work)
    assert abs(expected["law"] - expected["general"]) > 0.01
    (line,) = [each for each in read_metrics(work / name) if "validation_loss" in each]
    for key, loss in expected.items():
        assert abs(line["validation_loss" + f"/{key}" * bool(key)] - loss) <= 2e-6, key
    assert [(label.strip(), number, marks) for label, _, _, number, marks in LOSS.findall(log)] == [
        ("validation at iteration 1", "all 39", "  best"), ("law", "9", "  best"), ("general", "30", "  best"),
    ]  # fmt: skip
    for key, size in SIZES.items():
        assert f"validation: {key}: {size} samples, each evaluation takes all of them" in log


def test_every_record_has_a_series_for_each_name_and_the_best_is_of_all_starts(work: Path, sets: str) -> None:
    same = settings(work, "records", sets, TRAIN_ITERS=6, LR=2e-2, GPUS=2, SAVE_INTERVAL=2)
    found = LOSS.findall(step3_forked({**same, "EXIT_INTERVAL": 4}))
    shutil.rmtree(work / "records" / "iter_0000004")  # as if it had been killed before that was saved
    (work / "records" / "latest_checkpointed_iteration.txt").write_text("2")
    found = found[:6] + LOSS.findall(step3_forked(same))
    assert len(found) == 18
    lowest: dict[str, float] = {}
    for label, _, loss, _, marks in found:
        key = re.sub(r"\d+", "", label)
        assert ("best" in marks) == (float(loss) < lowest.get(key, 9.0)), (label, loss, lowest)
        lowest[key] = min(float(loss), lowest.get(key, 9.0))
    events = EventAccumulator(str(work / "records" / "tensorboard"))
    events.Reload()
    run_of = read_run(work / "records")
    for key in ("validation_loss", "validation_loss/law", "validation_loss/general"):
        curve = run_of.curve(key)
        assert [iteration for iteration, _ in curve] == [event.step for event in events.Scalars(key)] == [*range(1, 7)]
    assert {"best validation loss", "best validation loss, law", "best validation loss, general"} <= {*summary(run_of)}
    page = run("-m", "common.report", str(work / "records"), "--output", str(work / "report.html"))
    assert "ok: " in page and "validation, law" in (work / "report.html").read_text(encoding="utf-8")
    assert "validation loss, general " in run("-m", "common.watch", str(work / "records"), "--once")


def test_losses_on_other_sets_do_not_compare_and_the_best_before_stay(work: Path, sets: str) -> None:
    same = {"KEEP_BEST": 1, "KEEP_CHECKPOINTS": 1, "SAVE_INTERVAL": 1, "LR": 2e-2, "LR_DECAY_STYLE": "constant"}
    one = settings(work, "changed", sets, **same)
    step3_forked({**one, "TRAIN_ITERS": 3})
    losses = dict(read_run(work / "changed").curve("validation_loss"))
    best = min(losses, key=losses.__getitem__)
    other = f"law '{work}/b c/law' rest '{work}/b c/general'"
    log = step3_forked({**one, "VALID_DATASET_PATH": other, "TRAIN_ITERS": 6})
    assert "the validation data is another than before: the 3 losses so far do not compare" in log
    assert f"; their best, iterations {best}, stay kept" in log
    lines = [(label.strip(), marks) for label, _, _, _, marks in LOSS.findall(log)][:3]
    by_law = dict(read_run(work / "changed").curve("validation_loss/law"))
    law_is_best = by_law[4] < min(by_law[i] for i in (1, 2, 3))
    # law is the same data as before; all and rest are new.
    assert lines == [
        ("validation at iteration 4", "  best"), ("law", "  best" * law_is_best), ("rest", "  best"),
    ]  # fmt: skip
    saved = {int(path.name[5:]) for path in (work / "changed").glob("iter_*")}
    losses = {i: loss for i, loss in read_run(work / "changed").curve("validation_loss") if i > 3}
    assert saved == {best, 6, min(losses, key=losses.__getitem__)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("law {a} law {a}", "the name 'law' stands 2 times: give each set its own"),
        ("law {a} general", "the name 'general' has no path after it: give a name before each path"),
        ("law '' general {a}", "the name 'law' has no path after it"),
        ("law {a} general {a}x", "VALID_DATASET_PATH's general={a}x is not a dataset: neither"),
        ("{a} {a}", "'{a}' cannot be a name: one has letters, digits"),
        ("0.5 {a} law {a}", "'0.5' cannot be a name"),
        ("all {a} law {a}", "'all' cannot be a name"),
        ("law", "VALID_DATASET_PATH=law is not a dataset"),
    ],
)
def test_what_names_no_sets_is_refused(work: Path, text: str, message: str) -> None:
    log = step3_forked(settings(work, "refused", text.format(a=work / "sft")), code=2)
    assert message.format(a=work / "sft") in log and not (work / "refused").exists()


def test_one_path_has_no_name_and_takes_eval_iters_batches(work: Path, sets: str) -> None:
    log = step3(settings(work, "plain", f"{work}/b c/general", GPUS=2, EVAL_ITERS=2), work / "plain.log")
    assert [(number, marks) for _, _, _, number, marks in LOSS.findall(log)] == [("16", "  best")]
    (line,) = [each for each in read_metrics(work / "plain") if "validation_loss" in each]
    assert not [key for key in line if "/" in key]
