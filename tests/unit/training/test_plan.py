"""What a run will do: where it starts, how long it is, and what is refused before any process starts."""

import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from common.checkpoint.formats.checkpoint_paths import RELEASE, iteration_dir, write_tracker
from common.engine.v0_16 import MegatronCore016
from common.errors import KitError
from common.model.shape.config import load_config
from common.platforms import PLATFORMS
from common.platforms.base import Platform
from common.platforms.cpu import CPU
from common.platforms.nvidia import NVIDIA
from common.training.planning.datasets import content_hash
from common.training.planning.description import describe
from common.training.planning.plan import Plan, find_start, plan_run
from common.training.settings import TrainSettings
from tests.tiny import tiny_qwen, write_ramps

ROOT = Path(__file__).parents[3]
TOKENS_OF_A_DOCUMENT, DOCUMENTS = 17, 100


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of 100 documents of 17 tokens, as Megatron-LM's own tool would write them."""
    prefix = tmp_path_factory.mktemp("data") / "a_text_document"
    return write_ramps(prefix, DOCUMENTS, TOKENS_OF_A_DOCUMENT)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"save_checkpoint_path": "/nowhere", "dataset_path": "d", "epochs": 1.0, **changes})


def write_checkpoint(folder: Path, iteration: int | str, kind: str = "torch", tracked: bool = True) -> Path:
    """`folder`, holding the files by which a checkpoint is known."""
    path = iteration_dir(folder, iteration)
    if kind == "torch":
        (path / "mp_rank_00").mkdir(parents=True)
        (path / "mp_rank_00" / "model_optim_rng.pt").touch()
    else:
        path.mkdir(parents=True)
        (path / ".metadata").touch()
        (path / "metadata.json").touch()
    if tracked:
        write_tracker(folder, iteration)
    return folder


@pytest.mark.parametrize("initial", ["auto", "false"])
@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_a_run_resumes_its_newest_iteration_whatever_it_first_started_from(
    initial: str, kind: str, tmp_path: Path
) -> None:
    save = write_checkpoint(tmp_path / "save", 5, kind)
    write_checkpoint(save, 10, kind)
    load = write_checkpoint(tmp_path / "load", RELEASE)
    start = find_start(settings(save_checkpoint_path=str(save), load_checkpoint_path=str(load), is_initial_run=initial))
    assert (start.kind, start.model_folder) == ("resume", save)
    assert start.checkpoint is not None
    assert (start.checkpoint.iteration, start.checkpoint.format) == (10, kind)


@pytest.mark.parametrize("initial", ["auto", "true"])
@pytest.mark.parametrize("iteration", [RELEASE, 40])
def test_a_first_run_loads_only_the_weights(initial: str, iteration: int | str, tmp_path: Path) -> None:
    load = write_checkpoint(tmp_path / "load", iteration)
    save = tmp_path / "save"
    for made in (False, True):  # no folder, then an empty one
        if made:
            save.mkdir()
        start = find_start(
            settings(save_checkpoint_path=str(save), load_checkpoint_path=str(load), is_initial_run=initial)
        )
        assert (start.kind, start.model_folder) == ("weights", load)
        assert start.checkpoint is not None and start.checkpoint.iteration == iteration


def test_a_run_that_loads_from_where_it_saves_resumes(tmp_path: Path) -> None:
    save = write_checkpoint(tmp_path / "save", 5)
    assert find_start(settings(save_checkpoint_path=str(save), load_checkpoint_path=str(save))).kind == "resume"


def test_weights_that_are_there_win_over_random_ones(qwen: Path, tmp_path: Path) -> None:
    load = write_checkpoint(tmp_path / "load", RELEASE)
    assert find_start(settings(load_checkpoint_path=str(load), hf_model_path=str(qwen))).kind == "weights"


def test_weights_can_come_from_the_folder_of_one_iteration(tmp_path: Path) -> None:
    load = write_checkpoint(write_checkpoint(tmp_path / "load", 5), 10)
    start = find_start(settings(load_checkpoint_path=str(load / "iter_0000005")))
    assert start.kind == "weights" and start.checkpoint is not None
    assert (start.checkpoint.iteration, start.model_folder) == (5, load)


def test_converted_weights_in_the_save_folder_are_nothing_to_resume(tmp_path: Path) -> None:
    save = write_checkpoint(tmp_path / "save", RELEASE)
    start = find_start(settings(save_checkpoint_path=str(save), load_checkpoint_path=str(save)))
    assert start.kind == "weights"


def test_without_weights_a_model_folder_starts_from_random_ones(qwen: Path, tmp_path: Path) -> None:
    start = find_start(settings(save_checkpoint_path=str(tmp_path), hf_model_path=str(qwen)))
    assert (start.kind, start.model_folder, start.checkpoint) == ("random", qwen, None)


def test_a_killed_save_is_not_resumed_from(tmp_path: Path) -> None:
    save = write_checkpoint(tmp_path / "save", 5)
    write_checkpoint(save, 10, tracked=False)  # complete, but the tracker does not name it yet
    (save / "iter_0000015.partial").mkdir()
    start = find_start(settings(save_checkpoint_path=str(save)))
    assert start.checkpoint is not None and start.checkpoint.iteration == 5


def test_a_conversion_reads_the_newest_distributed_checkpoint(tmp_path: Path) -> None:
    load = write_checkpoint(tmp_path / "load", 10, "torch_dist")
    convert = {"train_or_convert_ckpt": "convert", "load_checkpoint_path": str(load)}
    start = find_start(settings(save_checkpoint_path=str(tmp_path / "save"), **convert))
    assert start.kind == "resume" and start.checkpoint is not None and start.checkpoint.iteration == 10
    write_checkpoint(load, RELEASE, "torch_dist")
    assert find_start(settings(save_checkpoint_path=str(tmp_path / "save"), **convert)).kind == "weights"


REFUSED_STARTS = [
    # contents of SAVE and LOAD, the settings, the message
    (5, None, {"is_initial_run": "true"}, "holds iteration 5: set IS_INITIAL_RUN=auto to resume it, or another SAVE_"),
    (None, 5, {"is_initial_run": "false"}, "IS_INITIAL_RUN=false, but {save} holds no iteration to resume from"),
    (RELEASE, None, {"is_initial_run": "false"}, "IS_INITIAL_RUN=false, but {save} holds no iteration to resume from"),
    (None, None, {}, "no weights to start from: set LOAD_CHECKPOINT_PATH to what step 2 wrote, or HF_MODEL_PATH"),
    (None, None, {"load_checkpoint_path": "{load}"}, "LOAD_CHECKPOINT_PATH={load} holds no checkpoint: give what step"),
    (None, None, {"load_checkpoint_path": "{load}/no"}, "LOAD_CHECKPOINT_PATH={load}/no is no folder: give what step"),
    (None, 5, {"train_or_convert_ckpt": "convert", "load_checkpoint_path": "{load}"}, "is already in torch format:"),
    (
        None,
        5,
        {"train_or_convert_ckpt": "convert", "load_checkpoint_path": "{save}/../save"},
        "SAVE_CHECKPOINT_PATH={save} is the folder that is read: choose another folder",
    ),
]


@pytest.mark.parametrize(
    "saved, loaded, changes, message", REFUSED_STARTS, ids=[case[3][:40] for case in REFUSED_STARTS]
)
def test_an_impossible_start_is_refused(
    saved: int | str | None, loaded: int | str | None, changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    folders = {"save": tmp_path / "save", "load": tmp_path / "load"}
    for folder, iteration in zip(folders.values(), (saved, loaded), strict=True):
        folder.mkdir()
        if iteration is not None:
            write_checkpoint(folder, iteration)
    changes = {name: text.format(**folders) for name, text in changes.items()}
    with pytest.raises(KitError, match=re.escape(message.format(**folders))):
        find_start(settings(save_checkpoint_path=str(folders["save"]), **changes))


def plan(data: Path, qwen: Path, platform: Platform = CPU, **changes: Any) -> Plan:
    defaults = {"dataset_path": str(data), "hf_model_path": str(qwen), "seq_length": 16, "global_batch_size": 4}
    return plan_run(settings(**{**defaults, **changes}), platform)


def test_a_plan_follows_from_settings_data_and_model(data: Path, qwen: Path) -> None:
    made = plan(data, qwen, gpus=2, tp=2, split="90,10,0", epochs=2.0)
    assert made.qwen == load_config(qwen)
    assert made.train is not None and made.valid is not None
    # n tokens, back to back, make (n - 1) // 16 samples
    assert made.train.samples_per_epoch == (90 * TOKENS_OF_A_DOCUMENT - 1) // 16 == 95
    assert made.valid.samples_per_epoch == (10 * TOKENS_OF_A_DOCUMENT - 1) // 16 == 10
    assert made.train_iters == 48  # 190 samples by 4
    assert made.num_microbatches == 2
    meaning = {
        "train_mode": "pretrain", "samples_per_epoch": 95, "seq_length": 16, "seed": 1234, "order": "listed",
    }  # fmt: skip
    assert made.data_identity == {**meaning, "content": content_hash(str(data))}


def test_a_warm_up_may_take_all_but_the_last_two_steps(data: Path, qwen: Path) -> None:
    assert plan(data, qwen, lr_warmup_iters=24).train_iters == 26


def test_the_platform_decides_what_is_not_set(data: Path, qwen: Path) -> None:
    for platform in (CPU, PLATFORMS["metax"], NVIDIA):
        made = plan(data, qwen, platform)
        assert made.transformer_impl == platform.transformer_impl
        assert made.ckpt_format == platform.checkpoint_format
    made = plan(data, qwen, NVIDIA, transformer_impl="local", ckpt_format="torch")
    assert (made.transformer_impl, made.ckpt_format) == ("local", "torch")


def test_separate_validation_data_leaves_the_training_data_unsplit(data: Path, qwen: Path) -> None:
    made = plan(data, qwen, valid_dataset_path=str(data), split="50,50,0")
    assert made.train is not None and made.valid is not None
    assert made.train.samples_per_epoch == made.valid.samples_per_epoch == (1700 - 1) // 16


@pytest.mark.parametrize("changes", [{"split": "100,0,0"}, {"eval_interval": 0, "split": "50,50,0"}], ids=str)
def test_a_run_may_have_no_validation(changes: dict[str, Any], data: Path, qwen: Path) -> None:
    assert plan(data, qwen, **changes).valid is None


@pytest.mark.parametrize(
    "platform, changes, message",
    [
        ("cpu", {"gpus": 4, "tp": 4}, "TP=4 does not divide num_key_value_heads=2 of this model: use TP in [1, 2]"),
        ("cpu", {"gpus": 3, "pp": 3, "global_batch_size": 2}, "4 layers cannot be divided by PP=3 x VPP=1 = 3"),
        ("cpu", {"seq_length": 1024}, "SEQ_LENGTH=1024 exceeds max_position_embeddings=512 in config.json: use a"),
        (
            "cpu",
            {"memory_snapshot": True},
            "MEMORY_SNAPSHOT=true needs a GPU, and the platform is cpu: set it to false",
        ),
        ("metax", {"async_save": True}, "ASYNC_SAVE=true works with CKPT_FORMAT=torch_dist only: set ASYNC_SAVE=false"),
        ("cpu", {"async_save": True, "ckpt_format": "torch"}, "ASYNC_SAVE=true works with CKPT_FORMAT=torch_dist only"),
        ("cpu", {"train_mode": "finetune"}, 'TRAIN_MODE=finetune needs "sft" data: change TRAIN_MODE'),
        # 104 samples by 4 are 26 steps, the last at MIN_LR
        ("cpu", {"lr_warmup_iters": 25, "seq_length": 16}, "LR_WARMUP_ITERS=25: the run has 26 steps, the last"),
        ("cpu", {"dataset_path": "/nowhere/a"}, "DATASET_PATH=/nowhere/a is not a dataset"),
        ("cpu", {"valid_dataset_path": "/nowhere/b"}, "/nowhere/b is not a dataset"),
        ("cpu", {"split": "1,99,0"}, "use more data, another SPLIT or a smaller SEQ_LENGTH"),
        ("cpu", {"split": "x"}, "SPLIT=x: give one to three non-negative numbers"),
        ("cpu", {"hf_model_path": "/nowhere/c"}, "/nowhere/c has no config.json: give a folder"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_it_starts(
    platform: str, changes: dict[str, Any], message: str, data: Path, qwen: Path
) -> None:
    with pytest.raises(KitError, match=re.escape(message)):
        plan(data, qwen, PLATFORMS[platform], **{"seq_length": 32, **changes})


RUN = {
    "layout": {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
    "data": {"train_mode": "pretrain", "samples_per_epoch": 104, "seq_length": 16, "seed": 1234},
}


def write_run(folder: Path, qwen: Path, run: dict[str, Any]) -> Path:
    """A checkpoint in torch format of iteration 5 with what training notes in it, and no weights."""
    write_checkpoint(folder, 5)
    torch.save({"model": {}, **run}, folder / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt")
    shutil.copy(qwen / "config.json", folder)
    return folder


def test_one_rank_of_a_node_looks_for_code_in_what_it_starts_from(
    data: Path, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = str(write_run(tmp_path / "save", qwen, {"run": RUN}))
    torch.save({"x": print}, f"{save}/iter_0000005/mp_rank_00/distrib_optim.pt")
    with pytest.raises(KitError, match="references .*print, .*could run code"):
        plan(data, qwen, save_checkpoint_path=save, hf_model_path=None, epochs=7.0)
    monkeypatch.setenv("LOCAL_RANK", "1")  # which waits for rank 0 before it reads
    assert plan(data, qwen, save_checkpoint_path=save, hf_model_path=None, epochs=7.0).start.kind == "resume"


def test_a_run_resumes_with_the_same_samples_and_sizes(data: Path, qwen: Path, tmp_path: Path) -> None:
    save = write_run(tmp_path / "save", qwen, {"run": RUN})
    made = plan(data, qwen, save_checkpoint_path=str(save), hf_model_path=None, epochs=7.0)
    assert made.start.kind == "resume"
    # RUN is of before these two were noted
    assert made.data_identity == {**RUN["data"], "order": "listed", "content": content_hash(str(data))}


@pytest.mark.parametrize(
    "run, changes, message",
    [
        ({"run": RUN}, {"seq_length": 8}, "(samples_per_epoch 104 -> 208, seq_length 16 -> 8)"),
        ({"run": RUN}, {"seed": 1}, "(seed 1234 -> 1), so its position in the data does not apply: use the same"),
        ({"run": {**RUN, "data": {**RUN["data"], "content": "0" * 16}}}, {}, f"(content {'0' * 16} -> "),
        ({"run": RUN}, {"gpus": 2}, "the optimizer of 1 data-parallel replicas, this run has 2 (DP x CP): use"),
        (
            {"run": RUN},
            {"gpus": 2, "tp": 2},
            "is in torch format at TP=1 PP=1 VPP=1, this run has TP=2 PP=1 VPP=1:",
        ),
        ({}, {}, "was not written by this kit's training, so it cannot be resumed: set LOAD_CHECKPOINT_PATH"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_resumed_is_refused(
    run: dict[str, Any], changes: dict[str, Any], message: str, data: Path, qwen: Path, tmp_path: Path
) -> None:
    save = write_run(tmp_path / "save", qwen, run)
    with pytest.raises(KitError, match=re.escape(message)):
        plan(data, qwen, save_checkpoint_path=str(save), **changes)


def test_the_plan_is_logged_one_line_per_subject(data: Path, qwen: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Any] = {"gpus": 8, "tp": 2, "pp": 2, "global_batch_size": 16, "train_iters": 12, "epochs": None}
    with caplog.at_level(logging.INFO, logger="kit"):
        describe(plan(data, qwen, PLATFORMS["metax"], split="90,10,0", lr=1e-3, **changes))
        assert caplog.messages[-7:] == [
            "metax: 8 processes = TP 2 x PP 2 x CP 1 x DP 2, local layers, bf16",
            "note: this kit was not run on metax hardware",
            f"start: random from {qwen}",
            "defaults of TRAIN_MODE=pretrain: LR_WARMUP_FRACTION=0.01, MIN_LR=0.0001",
            "data: 95 samples of 16 tokens an epoch; validation: 10 samples",
            "length: 12 steps of 16 samples = 2.02 epochs",
            "learning rate: warm-up of 0.0625 steps to 0.001, then cosine to 0.0001 in step 12",
        ]
        describe(plan(data, qwen, epochs=50_757.0))
    assert "note: LR=1e-05 is for continuing from trained weights" in caplog.text
    assert "note: the run passes over the data 50,757 times; more than 16 add little" in caplog.text


def test_checking_a_run_loads_no_megatron(data: Path, qwen: Path) -> None:
    program = f"""
import sys, torch.distributed.checkpoint; of_torch = set(sys.modules)  # before 2.4 it imports transformers itself
from common import train
sys.argv[1:] = {["--save-checkpoint-path=/nowhere", f"--dataset-path={data}", f"--hf-model-path={qwen}", "--check",
                 "--epochs=1", "--seq-length=16"]}
train.main()
print(*(name for name in ("megatron", "transformers") if name in set(sys.modules) - of_torch))
"""  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT), "KIT_PLATFORM": "cpu"},  # nvidia would check for GPUS devices
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "ok: the run can start\n\n"), done.stderr


@patch("common.engine.dist_checkpointing.installed_engine", MegatronCore016)
def test_an_optimizer_that_cannot_be_loaded_is_refused(data: Path, qwen: Path, tmp_path: Path) -> None:
    save = write_run(tmp_path / "save", qwen, {})
    for name in (".metadata", "metadata.json"):  # of torch_dist
        (save / "iter_0000005" / name).touch()
    for kind, sizes, message in (
        ("fully_sharded_model_space", {}, "megatron-core 0.14 loads; 0.16 is installed"),
        ("dp_zero_gather_scatter", {"gpus": 2, "tp": 2}, "it loads only at the TP, PP and VPP that it was saved with"),
    ):
        torch.save({"run": {**RUN, "optimizer_sharding": kind}}, save / "iter_0000005" / "common.pt")
        with pytest.raises(KitError, match=re.escape(message)):
            plan(data, qwen, save_checkpoint_path=str(save), hf_model_path=None, epochs=7.0, **sizes)
