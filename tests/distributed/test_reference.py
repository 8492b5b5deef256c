"""The reference of preference training, through the scripts: computed once, stored, checked, never another's."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from common.training.tracking.records import read_metrics
from tests.conversion import to_hf, to_megatron
from tests.distributed.launch import run, steps, words, worker
from tests.distributed.test_training import assert_same_curve
from tests.distributed.user import step3_forked
from tests.preferences import log_probs, write_pairs
from tests.tiny import tiny_qwen

BOUND = 1e-5  # of the largest log-probability, in float32
COMPUTES, READS = "computing the log-probabilities of", "are of these weights and data"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, their checkpoints, and two sets of pairs, whose numbers are no multiples of a batch."""
    folder = tmp_path_factory.mktemp("reference")
    for seed, name in enumerate(("qwen", "other")):
        tiny_qwen(folder / name, std=0.1, spread=0.1, seed=seed)
        to_megatron(folder / name, folder / f"{name}_start", ckpt_format="torch_dist")
    for name, number, first in (("a", 21, 0), ("b", 9, 100)):
        flags = {
            "input": write_pairs(folder / f"{name}.jsonl", number, first), "output_prefix": folder / name,
            "tokenizer_path": folder / "qwen", "workers": 1,
        }  # fmt: skip
        run("-m", "common.preprocess", "sft", *words(flags))
    return folder


@pytest.fixture
def work(pairs: Path, tmp_path: Path) -> Path:
    """A copy of `pairs`."""
    return shutil.copytree(pairs, tmp_path / "work")


def settings(work: Path, name: str = "run", **more: Any) -> dict[str, Any]:
    return {
        "TRAIN_MODE": "dpo", "DATASET_PATH": work / "a", "LOAD_CHECKPOINT_PATH": work / "qwen_start",
        "SAVE_CHECKPOINT_PATH": work / name, "SEQ_LENGTH": 128, "TRAIN_ITERS": 1, "SPLIT": "100,0",
        "PACKING": "false",  # a row for each answer, and packed where a test says so
        **more,
    }  # fmt: skip


def stored(work: Path, data: str = "a") -> dict[str, np.ndarray]:
    """The log-probabilities in the files beside a dataset, by file name."""
    return {path.name: np.load(path)["log_probs"] for path in sorted(work.glob(f"{data}.reference_*.npz"))}


def hugging_face(work: Path, model: str, data: str = "a") -> torch.Tensor:
    with torch.no_grad():
        return log_probs(Qwen2ForCausalLM.from_pretrained(work / model).float(), work / data)[0]


def largest_difference(mine: Any, theirs: torch.Tensor) -> float:
    return float((torch.as_tensor(mine) - theirs).abs().max() / theirs.abs().max())


def weights(work: Path, name: str) -> dict[str, torch.Tensor]:
    target = to_hf(work / name, work / f"{name}_exported")
    return load_file(target / "model.safetensors")


def test_it_is_hugging_faces_at_every_layout_and_read_by_the_next_run(work: Path) -> None:
    expected = hugging_face(work, "qwen")
    assert COMPUTES in step3_forked(settings(work))
    ((name, first),) = stored(work).items()
    assert largest_difference(first, expected) <= BOUND
    second = step3_forked(settings(work, "second"))
    assert READS in second and COMPUTES not in second

    (work / name).unlink()
    layout = {"TP": 2, "PP": 2, "GPUS": 4, "PACKING": "true", "SEQ_LENGTH": 320, "MICRO_BATCH_SIZE": 1}
    assert COMPUTES in step3_forked(settings(work, "third", **layout, GLOBAL_BATCH_SIZE=4))
    ((other_name, again),) = stored(work).items()
    assert other_name == name and largest_difference(again, expected) <= BOUND


def test_another_models_and_another_datas_file_is_never_used(work: Path) -> None:
    step3_forked(settings(work))
    (own,) = stored(work)
    assert COMPUTES in step3_forked(settings(work, "other", LOAD_CHECKPOINT_PATH=work / "other_start"))
    assert len(stored(work)) == 2
    (other,) = stored(work).keys() - {own}
    assert largest_difference(stored(work)[other], hugging_face(work, "other")) <= BOUND

    shutil.copy(work / other, work / own)
    log = step3_forked(settings(work, "copied"))
    assert f"{own} is of other weights and not used" in log and COMPUTES in log
    assert largest_difference(stored(work)[own], hugging_face(work, "qwen")) <= BOUND

    (work / own).write_bytes((work / own).read_bytes()[:-40])
    log = step3_forked(settings(work, "damaged"))
    assert f"{own} is damaged and not used" in log and COMPUTES in log

    for end in (".json", "_text_document.bin", "_text_document.idx", "_loss_mask_document.bin"):
        shutil.copy(work / f"b{end}", work / f"a{end}")
    shutil.copy(work / "b_loss_mask_document.idx", work / "a_loss_mask_document.idx")
    content = json.loads((work / "a.json").read_text())
    content["files"] = {name: file.replace("b_", "a_") for name, file in content["files"].items()}
    (work / "a.json").write_text(json.dumps(content))
    assert COMPUTES in step3_forked(settings(work, "new_data"))
    assert len(stored(work)) == 3


def test_truncated_pairs_have_a_file_of_their_own(work: Path) -> None:
    step3_forked(settings(work))
    (whole,) = stored(work)
    short = {"SEQ_LENGTH": 96, "TRUNCATE": "left"}
    log = step3_forked(settings(work, "left", **short))
    assert "pairs have more than SEQ_LENGTH=96 positions" in log and COMPUTES in log
    (cut,) = stored(work).keys() - {whole}
    changed = np.abs(stored(work)[cut] - stored(work)[whole]).max(1) > 1e-3
    assert 0 < changed.sum() < changed.size
    assert READS in step3_forked(settings(work, "left_again", **short))
    log = step3_forked(settings(work, "dropped", SEQ_LENGTH=96, TRUNCATE="drop"))  # the others have the same values
    assert READS in log and len(stored(work)) == 2


def test_it_goes_to_the_runs_folder_where_the_datas_cannot_be_written(work: Path) -> None:
    step3_forked(settings(work))
    ((name, found),) = stored(work).items()
    (work / name).unlink()
    (work / f"{name}.partial").mkdir()
    log = step3_forked(settings(work, "second"))
    assert f"{name} cannot be written" in log
    assert np.array_equal(np.load(work / "second" / name)["log_probs"], found)
    again = step3_forked(settings(work, "second", TRAIN_ITERS=2))
    assert READS in again and COMPUTES not in again


def test_a_resumed_run_is_the_same_bit_for_bit_also_when_its_reference_was_lost(work: Path) -> None:
    step3_forked(settings(work, "whole", TRAIN_ITERS=6))
    step3_forked(settings(work, "parts", TRAIN_ITERS=6, EXIT_INTERVAL=3))
    (name,) = stored(work)
    (work / name).unlink()
    gone = {"LOAD_CHECKPOINT_PATH": "", "TRAIN_ITERS": 6}
    assert f"{name}, the log-probabilities of the weights that the run began with, is missing" in step3_forked(
        settings(work, "parts", **gone), 2
    )
    other = settings(work, "parts", TRAIN_ITERS=6, LOAD_CHECKPOINT_PATH=work / "other_start")
    assert "whose weights are not those that the run in" in step3_forked(other, 2)
    assert COMPUTES in step3_forked(settings(work, "parts", TRAIN_ITERS=6))
    mine, theirs = weights(work, "parts"), weights(work, "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lines = [[line["loss"] for line in read_metrics(work / name)] for name in ("whole", "parts")]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    # What is stored is enough to go on: the weights that it came from may be gone.
    log = step3_forked(settings(work, "parts", LOAD_CHECKPOINT_PATH="", TRAIN_ITERS=7))
    assert READS in log and "iteration 7/7" in log


@pytest.mark.parametrize("packing", ["false", "true"])
def test_each_pair_of_a_blend_and_of_its_validation_set_is_compared_with_its_own_reference(
    work: Path, packing: str
) -> None:
    """Weights that do not change have no margin over themselves: any other pair's reference would show."""
    packed = {"PACKING": "true", "SEQ_LENGTH": 320, "MICRO_BATCH_SIZE": 1} if packing == "true" else {}
    given = settings(
        work, DATASET_PATH=f"0.6 {work}/a 0.4 {work}/b", LR=0, MIN_LR=0, TRAIN_ITERS=6, SPLIT="70,30", EVAL_INTERVAL=6,
        **packed,
    )  # fmt: skip
    step3_forked(given)
    *lines, validation = read_metrics(work / "run")
    assert len(lines) == 6 and len(stored(work)) == len(stored(work, "b")) == 1
    for line in lines:
        assert abs(line["loss"] - math.log(2)) < 1e-5
        assert abs(line["reward_chosen"]) < 1e-5 and abs(line["reward_rejected"]) < 1e-5
        assert line["log_prob_chosen"] < -1
    assert abs(validation["validation_loss"] - math.log(2)) < 1e-5


def test_validation_sets_count_each_pair_once(work: Path) -> None:
    """9 and 21 pairs are no multiple of the 4 that run at once; ORPO's loss needs no reference."""
    given = settings(
        work, VALID_DATASET_PATH=f"law {work}/a general {work}/b", DPO_LOSS="orpo", LR=0, MIN_LR=0, EVAL_INTERVAL=1,
        GPUS=2,
    )  # fmt: skip
    log = step3_forked(given)
    assert COMPUTES not in log and not stored(work)
    validation = read_metrics(work / "run")[-1]
    losses, right = [], []
    model = Qwen2ForCausalLM.from_pretrained(work / "qwen").float()
    for name, data in (("law", "a"), ("general", "b")):
        with torch.no_grad():
            sums, numbers = log_probs(model, work / data)
        p = (sums / numbers).exp()
        odds = (p / (1 - p)).log()
        losses.append(-p[:, 0].log() - 0.1 * torch.nn.functional.logsigmoid(odds[:, 0] - odds[:, 1]))
        right.append((p[:, 0] > p[:, 1]).float())
        assert abs(validation[f"validation_loss/{name}"] - float(losses[-1].mean())) <= 1e-5
        assert abs(validation[f"validation_accuracy/{name}"] - float(right[-1].mean())) <= 1e-6
    assert abs(validation["validation_loss"] - float(torch.cat(losses).mean())) <= 1e-5
    assert 0 < float(torch.cat(right).mean()) < 1
    assert abs(validation["validation_accuracy"] - float(torch.cat(right).mean())) <= 1e-6


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"GPUS": 2},
    "one at a time": {"MICRO_BATCH_SIZE": 1},
    "tp2_pp2": {"TP": 2, "PP": 2, "GPUS": 4},
}


@pytest.mark.parametrize("packing", [False, True])
def test_every_layout_and_micro_batch_size_follows_one_process(work: Path, packing: bool) -> None:
    """Packed rows hold one, two or three pairs, so that ranks and micro-batches have different numbers of them."""
    packed = {"PACKING": "true", "SEQ_LENGTH": 384, "GLOBAL_BATCH_SIZE": 4} if packing else {}
    common = {"DATASET_PATH": f"0.6 {work}/a 0.4 {work}/b", "TRAIN_ITERS": 5, "DPO_SFT_WEIGHT": 0.1, **packed}
    one = steps(step3_forked(settings(work, "one", MICRO_BATCH_SIZE=2, **common)))
    assert len(one) == 5 and one[-1][1] < 0.7 * one[0][1]
    for name, layout in LAYOUTS.items():
        found = steps(step3_forked(settings(work, name, **{**common, **layout})))
        assert_same_curve(found, one)


def test_a_stop_on_any_rank_ends_the_computation_of_the_reference_with_nothing_stored(work: Path) -> None:
    given = {
        "train_mode": "dpo", "dataset_path": str(work / "a"), "load_checkpoint_path": str(work / "qwen_start"),
        "save_checkpoint_path": str(work / "run"), "seq_length": 128, "train_iters": 1, "precision": "fp32",
        "packing": False,
        "global_batch_size": 8, "micro_batch_size": 1, "tp": 2, "gpus": 2, "num_workers": 0,
    }  # fmt: skip
    worker(2, {"settings": given, "joined": False, "stopped": True}, "preference_worker")
    assert not stored(work)


def test_what_does_not_fit_is_refused_by_name(work: Path, inputs: Path) -> None:
    sft = {"DATASET_PATH": inputs / "sft"}
    refused = {
        'is "preference" data, but TRAIN_MODE=finetune needs "sft"': {"TRAIN_MODE": "finetune"},
        'is "sft" data, but TRAIN_MODE=dpo needs "preference"': sft,
        "CP=2 is not supported with TRAIN_MODE=dpo": {"CP": 2, "GPUS": 2},
        "random ones prefer nothing": {"LOAD_CHECKPOINT_PATH": "", "HF_MODEL_PATH": work / "qwen"},
        "DPO_BETA=0.2 is for TRAIN_MODE=dpo": {**sft, "TRAIN_MODE": "finetune", "DPO_BETA": 0.2},
        "DPO_SFT_WEIGHT=1 with DPO_LOSS=orpo": {"DPO_LOSS": "orpo", "DPO_SFT_WEIGHT": 1},
        "set TRUNCATE=drop, left or right, or a larger SEQ_LENGTH": {"SEQ_LENGTH": 64},
    }  # fmt: skip
    for message, changed in refused.items():
        assert message in step3_forked(settings(work, **changed), 2), message
    log = step3_forked(settings(work, LOAD_CHECKPOINT_PATH="", HF_MODEL_PATH=work / "qwen", DPO_LOSS="orpo"))
    assert "iteration 1/1" in log
