"""`python -m common.convert` as users run it: round trips of real folders, and wrong use."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint.conversion import hf_to_megatron
from common.checkpoint.conversion.common_steps import set_config_dtype
from common.checkpoint.conversion.output_folder import REPORT
from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.errors import KitError
from common.log import logger
from tests.conversion import to_hf, to_megatron
from tests.end_to_end.converting import TRACKER, run_main, same, tree, weights, words
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cpu" / "2_convert_between_hf_megatron.sh"
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tied or not, to its Hugging Face folder."""
    return {tied: tiny_qwen(tmp_path_factory.mktemp("qwen"), tie_word_embeddings=tied) for tied in (True, False)}


@pytest.fixture(autouse=True)
def restore_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_round_trip_gives_the_same_bits(
    tmp_path: Path, qwen: dict[bool, Path], tp: int, pp: int, ckpt_format: str, tied: bool, impl: str
) -> None:
    source = qwen[tied]
    options = {"tp": tp, "pp": pp, "ckpt_format": ckpt_format, "transformer_impl": impl}
    megatron = to_megatron(source, tmp_path / "megatron", **options)
    back = to_hf(megatron, tmp_path / "hf")
    assert same(weights(back), weights(source))
    assert sorted(path.name for path in back.iterdir()) == sorted([*MODEL_FILES, REPORT, "model.safetensors"])
    for folder in (megatron, back):
        assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in MODEL_FILES)
    found = find_checkpoint(megatron)
    assert found is not None and (found.iteration, found.format) == ("release", ckpt_format)
    ranks = {
        (1, 1): ["mp_rank_00"],
        (2, 1): ["mp_rank_00", "mp_rank_01"],
        (1, 2): ["mp_rank_00_000", "mp_rank_00_001"],
        (2, 2): ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"],
    }[tp, pp]
    dist = [".metadata", "__0_0.distcp", "checksums.json", "common.pt", "metadata.json"]
    assert sorted(path.name for path in found.path.iterdir()) == (ranks if ckpt_format == "torch" else dist)


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_qwen3_survives_a_round_trip(tmp_path: Path, ckpt_format: str, tied: bool, impl: str) -> None:
    source = tiny_qwen(tmp_path / "qwen3", model_type="qwen3", head_dim=32, tie_word_embeddings=tied)
    options = {"tp": 2, "pp": 2, "ckpt_format": ckpt_format, "transformer_impl": impl}
    back = to_hf(to_megatron(source, tmp_path / "megatron", **options), tmp_path / "hf")
    assert same(weights(back), weights(source)) and len(weights(back)) == 4 * 11 + 2 + (not tied)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


# Heads, groups, head size, tied; the MLP is as much wider than the model as theirs, to what TP divides.
FAMILIES = {
    "0.5B": (14, 2, 8, 5.43, True), "1.5B": (12, 2, 8, 5.83, True), "R1 1.5B": (12, 2, 8, 5.83, False),
    "3B": (16, 2, 8, 5.375, True), "7B": (28, 4, 4, 5.29, False), "14B": (40, 8, 4, 2.7, False),
    "32B": (40, 8, 4, 5.4, False), "72B": (64, 8, 4, 3.61, False),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_each_familys_proportions_survive_a_round_trip(tmp_path: Path, name: str) -> None:
    heads, groups, head_dim, wider, tied = FAMILIES[name]
    shape = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_key_value_heads": groups}
    width = int(wider * heads * head_dim) // groups * groups
    source = tiny_qwen(tmp_path / "hf", **shape, intermediate_size=width, tie_word_embeddings=tied, num_hidden_layers=3)
    for options in (
        {"tp": groups, "pp": 3},
        {"tp": 2, "pp": 2, "pipeline_layers": "2,1"},
        {"ckpt_format": "torch_dist"},
    ):
        megatron = to_megatron(source, tmp_path / "megatron", **options)
        assert same(weights(to_hf(megatron, tmp_path / "back")), weights(source))
        shutil.rmtree(megatron)
        shutil.rmtree(tmp_path / "back")


@pytest.mark.parametrize(
    ("pp", "vpp", "layers"), [(3, 1, "1,2,1"), (3, 1, "2,1,1"), (2, 1, "3,1"), (4, 1, "1,1,1,1"), (2, 2, "1,1,1,1")]
)
def test_stages_of_other_sizes_survive_a_round_trip(
    tmp_path: Path, qwen: dict[bool, Path], pp: int, vpp: int, layers: str
) -> None:
    megatron = to_megatron(qwen[True], tmp_path / "megatron", tp=2, pp=pp, vpp=vpp, pipeline_layers=layers)
    files = [megatron / "release" / f"mp_rank_01_{stage:03d}" / "model_optim_rng.pt" for stage in range(pp)]
    states = [torch.load(path, weights_only=False) for path in files]
    keys = ["model"] if vpp == 1 else [f"model{chunk}" for chunk in range(vpp)]
    counted = [sum("linear_fc2" in name for name in state[key]) for key in keys for state in states]
    assert counted == [int(word) for word in layers.split(",")]
    assert same(weights(to_hf(megatron, tmp_path / "hf")), weights(qwen[True]))


def test_virtual_chunks_and_several_shards_survive_a_round_trip(tmp_path: Path, qwen: dict[bool, Path]) -> None:
    megatron = to_megatron(qwen[True], tmp_path / "megatron", tp=2, pp=2, vpp=2)
    state = torch.load(megatron / "release" / "mp_rank_01_001" / "model_optim_rng.pt", weights_only=False)
    assert {"model0", "model1"} <= set(state) and state["args"].virtual_pipeline_model_parallel_size == 2
    back = to_hf(megatron, tmp_path / "hf", max_shard_size="200KB")
    assert same(weights(back), weights(qwen[True])) and len(list(back.glob("*.safetensors"))) > 3
    again = to_megatron(back, tmp_path / "again", tp=2, pp=2, vpp=2)
    assert tree(again / "release") == tree(megatron / "release")


def test_one_iteration_and_another_models_files(tmp_path: Path, qwen: dict[bool, Path]) -> None:
    megatron = to_megatron(qwen[False], tmp_path / "megatron")
    (megatron / "release").rename(megatron / "iter_0000020")
    (megatron / "config.json").unlink()
    (megatron / TRACKER).unlink()
    back = to_hf(megatron / "iter_0000020", tmp_path / "hf", hf_model_path=str(qwen[False]))
    assert same(weights(back), weights(qwen[False])) and (back / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_dtype_casts_and_config_records_it(tmp_path: Path, qwen: dict[bool, Path], name: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    cast = {key: tensor.to(dtype) for key, tensor in weights(qwen[True]).items()}
    for kind in ("torch", "torch_dist"):
        megatron = to_megatron(qwen[True], tmp_path / kind, dtype=name, ckpt_format=kind)
        assert same(weights(to_hf(megatron, tmp_path / f"hf of {kind}")), cast)
    plain = to_megatron(qwen[True], tmp_path / "plain")
    back = to_hf(plain, tmp_path / "hf", dtype=name)
    assert same(weights(back), cast)
    source = json.loads((qwen[True] / "config.json").read_text())
    for folder in (
        back,
        tmp_path / "torch",
        tmp_path / "torch_dist",
        tmp_path / "hf of torch",
        tmp_path / "hf of torch_dist",
    ):
        config = json.loads((folder / "config.json").read_text())
        assert config.pop("torch_dtype") == str(dtype).removeprefix("torch.")
        assert config == {key: value for key, value in source.items() if key != "torch_dtype"}


def test_the_name_of_the_dtype_in_config_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32", "名": 1}')
    set_config_dtype(tmp_path / "config.json", torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "bfloat16", "名": 1}
    before = (tmp_path / "config.json").read_bytes()
    set_config_dtype(tmp_path / "config.json", torch.bfloat16)
    assert (tmp_path / "config.json").read_bytes() == before


def test_check_prints_ok_and_writes_nothing(
    tmp_path: Path, qwen: dict[bool, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    megatron = to_megatron(qwen[True], tmp_path / "megatron", tp=2)
    before = tree(tmp_path)
    for command, expected in (
        (words("hf-to-megatron", load_checkpoint_path=qwen[True], save_checkpoint_path=tmp_path / "new", tp=2),
         f"ok: 50 tensors can be converted to {tmp_path / 'new'}\n"),
        (words("megatron-to-hf", load_checkpoint_path=megatron, save_checkpoint_path=tmp_path / "new"),
         f"ok: 50 tensors of {megatron / 'release'} can be converted to {tmp_path / 'new'}\n"),
        (words("verify", hf_model_path=qwen[True], load_checkpoint_path=megatron),
         f"ok: {qwen[True]} and {megatron / 'release'} can be compared\n"),
    ):  # fmt: skip
        assert run_main([*command, "--check"]) == 0 and capsys.readouterr().out == expected
        assert tree(tmp_path) == before


def test_verify_finds_a_flipped_bit(tmp_path: Path, qwen: dict[bool, Path], capsys: pytest.CaptureFixture[str]) -> None:
    megatron = to_megatron(qwen[False], tmp_path / "megatron", tp=2, pp=2)
    command = words("verify", hf_model_path=qwen[False], load_checkpoint_path=megatron)
    assert run_main(command) == 0 and "verification: 51 tensors, 0.00 GB: all bits agree" in capsys.readouterr().err
    assert run_main([*command, "--dtype", "bf16"]) == 0
    path = megatron / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"]["decoder.layers.1.mlp.linear_fc1.weight"].view(torch.int32)[3, 3] ^= 1
    torch.save(state, path)
    assert run_main(command) == 2
    difference = "decoder.layers.3.mlp.linear_fc1.weight of TP rank 1 differs from model.layers.3.mlp.gate_proj.weight"
    assert f"error: verification failed: {difference}: copy the source again" in capsys.readouterr().err
    assert run_main([*command, "--report", str(tmp_path / "report.json")]) == 2
    assert f"{difference} (all in {tmp_path / 'report.json'}): copy" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["errors"] == [difference]


def start_script(folder: Path, **settings: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in settings.items()}}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", str(SCRIPT)], env=environment, stdout=pipe, stderr=pipe, text=True, cwd=folder)


def test_the_script_converts_in_both_directions_and_reports_a_mistake(tmp_path: Path, qwen: dict[bool, Path]) -> None:
    there = {"CONVERT_TYPE": "huggingface-to-megatron", "LOAD_CHECKPOINT_PATH": qwen[True], "PP": 2, "VPP": 2}
    there |= {"CKPT_FORMAT": "torch"}
    mistaken = start_script(tmp_path, **there, TP=3, SAVE_CHECKPOINT_PATH="new")
    process = start_script(tmp_path, **there, TP=2, SAVE_CHECKPOINT_PATH="a b/megatron")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ""), err
    assert "verification: 50 tensors, 0.00 GB: all bits agree" in err
    assert err.endswith("LOAD_CHECKPOINT_PATH=a b/megatron\n")
    back = {"CONVERT_TYPE": "megatron-to-huggingface", "LOAD_CHECKPOINT_PATH": "a b/megatron", "DTYPE": "bf16"}
    process = start_script(tmp_path, **back, SAVE_CHECKPOINT_PATH="hf")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ""), err
    assert "torch, TP=2 PP=2 VPP=2, local names" in err and "written: hf" in err and "\r" not in err
    assert same(weights(tmp_path / "hf"), {name: tensor.bfloat16() for name, tensor in weights(qwen[True]).items()})
    out, err = mistaken.communicate(timeout=120)
    assert (mistaken.returncode, out) == (2, "")
    environment, _, rest = err.partition("+ env ")
    assert " LOAD_CHECKPOINT_PATH SAVE_CHECKPOINT_PATH TP " in environment.replace("\n", "")
    message = "error: TP=3 does not divide num_attention_heads=4 of this model: use TP in [1, 2]\n"
    assert rest.replace(" \\\n", "").splitlines(keepends=True)[1:] == [message] and not (tmp_path / "new").exists()


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such folder": (
        "hf-to-megatron", {"load_checkpoint_path": "/nowhere"}, "/nowhere has no config.json: give a folder with"),
    "no config.json": (
        "hf-to-megatron", {"load_checkpoint_path": "{root}/empty"}, "empty has no config.json: give a folder with"),
    "no weights": (
        "hf-to-megatron", {"load_checkpoint_path": "{root}/config"}, "config holds neither model.safetensors.index"),
    "other weights": (
        "hf-to-megatron", {"load_checkpoint_path": "{root}/other"},
        "other lacks lm_head.weight, and its config.json does not tie the embeddings: set tie_word_embeddings to true"),
    "TP": ("hf-to-megatron", {"tp": 3}, "TP=3 does not divide num_attention_heads=4 of this model: use TP in [1, 2]"),
    "TP of groups": (
        "hf-to-megatron", {"tp": 4}, "TP=4 does not divide num_key_value_heads=2 of this model: use TP in [1, 2]"),
    "TP of zero": ("hf-to-megatron", {"tp": 0}, "TP=0: it must be at least 1"),
    "PP": ("hf-to-megatron", {"pp": 3}, "4 layers cannot be divided by PP=3 x VPP=1 = 3: choose PP and VPP whose"),
    "stages": (
        "hf-to-megatron", {"pp": 3, "pipeline_layers": "2,2,2"},
        "PIPELINE_LAYERS=2,2,2 are 3 numbers of 6 layers: PP=3 x VPP=1 needs 3 numbers, of 4 layers together"),
    "stages in words": (
        "hf-to-megatron", {"pp": 2, "pipeline_layers": "4,0"},
        "PIPELINE_LAYERS=4,0: give the layers of each pipeline stage with commas, as 7,7,8,6"),
    "VPP": ("hf-to-megatron", {"vpp": 2}, "VPP=2 needs pipeline stages, but PP=1: set PP to 2 or more, or VPP=1"),
    "format": ("hf-to-megatron", {"ckpt_format": "zarr"}, "argument --ckpt-format: invalid choice: 'zarr'"),
    "not empty": (
        "hf-to-megatron", {"save_checkpoint_path": "{root}/other"},
        "other is not empty, it holds config.json: choose another folder, or remove what is in it"),
    "into itself": (
        "hf-to-megatron", {"save_checkpoint_path": "{hf}"}, "is the input folder: choose another folder"),
    "a file": ("hf-to-megatron", {"save_checkpoint_path": "{hf}/config.json"}, "json is a file: choose a folder"),
    "no checkpoint": (
        "megatron-to-hf", {"load_checkpoint_path": "{root}/empty"},
        "empty holds no Megatron checkpoint: give step 2's or a run's folder"),
    "no such checkpoint": (
        "megatron-to-hf", {"load_checkpoint_path": "/nowhere"}, "LOAD_CHECKPOINT_PATH=/nowhere holds no Megatron"),
    "a Hugging Face folder": (
        "megatron-to-hf", {"load_checkpoint_path": "{hf}"}, "holds no Megatron checkpoint: give step 2's or a run's"),
    "checkpoint into itself": (
        "megatron-to-hf", {"save_checkpoint_path": "{root}/megatron"}, "is the input folder: choose another"),
    "checkpoint without config": (
        "megatron-to-hf", {"load_checkpoint_path": "{root}/bare"},
        "bare has no config.json: set HF_MODEL_PATH to the original model"),
    "another model": (
        "megatron-to-hf", {"hf_model_path": "{root}/other"}, "lacks output_layer.weight, and its config.json does"),
    "lost": (
        "megatron-to-hf", {"load_checkpoint_path": "{root}/lost"},
        "names iter_0000007, which does not exist: restore that folder, or write one of ['release'] there"),
    "size": ("megatron-to-hf", {"max_shard_size": "5"}, "MAX_SHARD_SIZE=5: give a number and one of KB, MB, GB"),
    "dtype": ("megatron-to-hf", {"dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
    "nothing to compare": (
        "verify", {"load_checkpoint_path": "{root}/empty"}, "empty holds no Megatron checkpoint: give step 2's"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, qwen: dict[bool, Path]) -> Path:
    """Folders that lack something."""
    root = tmp_path_factory.mktemp("wrong")
    config = (qwen[False] / "config.json").read_text()
    for name in ("empty", "config", "other"):
        (root / name).mkdir()
    for name in ("config", "other"):
        (root / name / "config.json").write_text(config)
    save_file(weights(qwen[True]), root / "other" / "model.safetensors")
    for name in ("megatron", "bare", "lost"):
        to_megatron(qwen[True], root / name)
    (root / "bare" / "config.json").unlink()
    (root / "lost" / TRACKER).write_text("7")
    return root


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_use_gets_one_message(
    tmp_path: Path, qwen: dict[bool, Path], wrong: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, changes, message = MISTAKES[name]
    flags: dict[str, Any] = {
        "hf-to-megatron": {"load_checkpoint_path": "{hf}", "save_checkpoint_path": tmp_path / "new"},
        "megatron-to-hf": {"load_checkpoint_path": "{root}/megatron", "save_checkpoint_path": tmp_path / "new"},
        "verify": {"hf_model_path": "{hf}"},
    }[command]
    given = {key: str(value).format(hf=qwen[True], root=wrong) for key, value in (flags | changes).items()}
    before = tree(wrong)
    assert run_main(words(command, **given)) == 2
    out, err = capsys.readouterr()
    (error,) = [line for line in err.splitlines() if "error: " in line]
    assert message in error and "Traceback" not in err and not out
    assert tree(wrong) == before and not (tmp_path / "new").exists()


def test_a_verification_that_fails_leaves_no_folder_that_looks_finished(
    tmp_path: Path, qwen: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(states: dict[Path, Any], *arguments: Any) -> None:
        save_rank_files(states, *arguments)
        for path in states:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

    save_rank_files = hf_to_megatron.save_rank_files
    monkeypatch.setattr(hf_to_megatron, "save_rank_files", damage)  # as a disk that does not keep what it was given
    with pytest.raises(
        KitError, match=r"verification failed: .* differs from model\..* \(all in .*/conversion_report\.json\)"
    ):
        to_megatron(qwen[True], tmp_path / "megatron")
    assert [path.name for path in (tmp_path / "megatron").iterdir()] == [REPORT]
    report = json.loads((tmp_path / "megatron" / REPORT).read_text())
    assert len(report["errors"]) == 1 and "differs from model." in report["errors"][0]
    assert report["result"].endswith(": 1 differences")
    assert (len(report["megatron"]), len(report["hugging_face"])) == (30, 50)
    monkeypatch.undo()
    to_megatron(qwen[True], tmp_path / "megatron")  # a report alone does not block it
    assert not json.loads((tmp_path / "megatron" / REPORT).read_text())["errors"]
