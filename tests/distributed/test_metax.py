"""MetaX's platform on the CPU, all its facts in force: what a run does, and the checkpoints of the kit before this one.

Not MetaX's hardware, and stubs for its flash_attn and apex: the tests show only how the kit uses them.
"""

import json
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.model.shape.config import load_config
from tests.conversion import to_hf, to_megatron
from tests.distributed.launch import ROOT, run, steps, train, train_forked, words
from tests.tiny import TEXTS, tiny_qwen
from tests.unit.checkpoint.small import write_ranks

pytestmark = pytest.mark.lane
METAX = {"KIT_PLATFORM": "metax", "KIT_TEST_ON_CPU": "true"}
STUBS = ROOT / "tests" / "stubs"
RANKS = ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and the model's checkpoint at TP2 PP2 as MetaX's platform reads it."""
    folder = tmp_path_factory.mktemp("metax")
    qwen = tiny_qwen(folder / "qwen", std=0.05, spread=0.05)
    rows = [{"text": f"{i} " + TEXTS[i % 4] * (1 + i % 3)} for i in range(60)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"input": folder / "d.jsonl", "output_prefix": folder / "d", "tokenizer_path": qwen, "workers": 1}
    run("-m", "common.preprocess", "pretrain", *words(flags))
    to_megatron(qwen, folder / "start", tp=2, pp=2, transformer_impl="local", ckpt_format="torch")
    return folder


def settings(work: Path, save: str, **more: Any) -> dict[str, Any]:
    return {
        "dataset_path": work / "d", "load_checkpoint_path": work / "start", "save_checkpoint_path": work / save,
        "tp": 2, "pp": 2, "gpus": 4, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 6,
        "log_interval": 1, "lr": 1e-3, "min_lr": 1e-4, "split": "100,0,0", "precision": "bf16",
        **more,
    }  # fmt: skip


def vendor(*names: str) -> dict[str, str]:
    """The environment with stubs for these packages of the vendor's."""
    return {**METAX, "PYTHONPATH": ":".join([*(str(STUBS / name) for name in names), str(ROOT)])}


@pytest.fixture(scope="module")
def plain(work: Path) -> str:
    """The log of a run without the vendor's packages."""
    return train_forked(**settings(work, "plain"), more=METAX)


def test_a_run_logs_what_it_found_and_saves_in_torch_format(work: Path, plain: str) -> None:
    assert "metax on a CPU, for tests: 4 processes = TP 2 x PP 2 x CP 1 x DP 1, local layers, bf16" in plain
    assert "this kit was not run on metax" in plain
    assert "core attention: sdpa (flash_attn: no module flash_attn)" in plain
    assert "optimizer: torch.optim.adamw.AdamW" in plain
    assert "CKPT_FORMAT=torch_dist" not in plain
    saved = work / "plain" / "iter_0000006"
    assert sorted(path.name for path in saved.iterdir()) == RANKS
    state = torch.load(saved / RANKS[0] / "model_optim_rng.pt", weights_only=False)
    assert "decoder.layers.0.input_layernorm.weight" in state["model"], "local layers' names"


def test_the_vendors_attention_and_adam_are_used_where_installed_and_train_the_same(work: Path, plain: str) -> None:
    log = train_forked(**settings(work, "vendors"), more=vendor("flash_attn", "apex"))
    assert "core attention: flash_attn\n" in log and "optimizer: apex.optimizers.FusedAdam" in log
    for (_, loss, _), (_, expected, _) in zip(steps(log), steps(plain), strict=True):
        assert abs(loss - expected) <= 0.02, (steps(log), steps(plain))
    with_sdpa = train(**settings(work, "sdpa"), core_attention="sdpa", more=vendor("flash_attn"))
    assert "core attention: sdpa\n" in with_sdpa and steps(with_sdpa) == steps(plain)


def test_a_requested_kernel_that_is_missing_stops_the_run(work: Path) -> None:
    log = train(**settings(work, "missing"), core_attention="flash_attn", more=METAX, expect=2)
    message = (
        "error: CORE_ATTENTION=flash_attn needs flash_attn, which is not installed: install the vendor's build of it,"
        " or set it to"
    )
    assert message in log  # before any process starts
    assert not (work / "missing").exists()


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_a_stopped_run_with_the_vendors_adam_resumes_as_if_uninterrupted(ckpt_format: str, work: Path) -> None:
    more = vendor("flash_attn", "apex")
    flags = {"ckpt_format": ckpt_format, "tp": 2, "pp": 2, "gpus": 4}
    uninterrupted = train_forked(**settings(work, f"whole_{ckpt_format}", **flags), more=more)
    assert ("CKPT_FORMAT=torch_dist was not run on metax" in uninterrupted) == (ckpt_format == "torch_dist")
    name = f"halves_{ckpt_format}"
    halves = [train_forked(**settings(work, name, **flags), exit_interval=3, more=more) for _ in range(2)]
    assert steps(halves[0]) + steps(halves[1]) == steps(uninterrupted)


def old_checkpoint(work: Path, folder: Path, trained: bool) -> Path:
    """As the legacy kit left it on MetaX: local names, its own arguments; with `trained`, the full state of a run."""
    qwen, weights = load_config(work / "qwen"), load_file(work / "qwen" / "model.safetensors")
    name = "iter_0000020" if trained else "release"
    write_ranks(folder / name, weights, qwen, [[range(2)], [range(2, 4)]], tp=2, impl="local")
    for path in (folder / name).glob("mp_rank_*/model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        state["args"] = Namespace(
            num_layers=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, padded_vocab_size=512,
            transformer_impl="local", params_dtype=torch.bfloat16, hf_ckpt_path="/mnt/qwen", consumed_train_samples=160,
        )  # fmt: skip
        if trained:
            state |= {
                "iteration": 20, "opt_param_scheduler": {"max_lr": 6.5e-5, "num_steps": 160},
                "optimizer": {"optimizer": {"param_groups": [{"lr": 1e-5, "step": 20}]}},
                "rng_state": [{"random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()}],
                "num_floating_point_operations_so_far": 1.0,
            }  # fmt: skip
        torch.save(state, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("20" if trained else "release")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((work / "qwen" / file).read_bytes())
    return folder


@pytest.mark.parametrize("trained", [False, True], ids=["converted", "trained"])
def test_the_old_kits_checkpoints_load_resume_and_are_exported(work: Path, plain: str, trained: bool) -> None:
    name = f"old_{trained}"
    folder = old_checkpoint(work, work / name, trained)
    log = train_forked(**settings(work, f"{name}_run", load_checkpoint_path=folder), more=METAX)
    assert f"start: weights from {folder}" in log
    assert steps(log) == steps(plain), "bit for bit the run from our own conversion"
    exports = (to_hf(work / each, work / f"{name}_{each}_hf") for each in (f"{name}_run", "plain"))
    mine, theirs = (load_file(folder / "model.safetensors") for folder in exports)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_the_old_kits_run_is_not_resumed_by_mistake(work: Path) -> None:
    folder = old_checkpoint(work, work / "old_resumed", trained=True)
    log = train(**settings(work, "old_resumed"), more=METAX, expect=2)
    assert "was not written by this kit's training" in log and "LOAD_CHECKPOINT_PATH" in log
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "20"
