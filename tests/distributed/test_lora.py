"""LoRA against PEFT on Hugging Face's model, at every layout; what its checkpoints hold, and what comes out of them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from common.checkpoint.formats.checkpoint_size import checkpoint_bytes
from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.model.shape.config import load_config
from common.model.shape.lora import MODULES
from common.model.shape.lora import LoraConfig as LoraShape
from common.training.checkpointing.run_folder import size_of
from common.training.tracking.records import read_metrics
from tests.conversion import to_megatron
from tests.distributed.hf_loss import hf_loss
from tests.distributed.launch import forked, steps, train_forked, words
from tests.distributed.user import step3, step3_forked

LORA = LoraShape(16, 32.0, MODULES)  # by default
BOUND = 1e-5  # of each gradient's largest value
RANDOM = {"r": 4, "lora_alpha": 12, "target_modules": list(MODULES), "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def peft(work: Path) -> Path:
    """An adapter in which no matrix is zero."""
    return write_adapter(work, work / "peft")


def write_adapter(work: Path, folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    model: Any = get_peft_model(Qwen2ForCausalLM.from_pretrained(work / "qwen").float(), LoraConfig(**RANDOM | config))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.05)
    model.save_pretrained(folder)
    return folder


def settings(work: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "TRAIN_MODE": "finetune", "DATASET_PATH": work / "sft", "LOAD_CHECKPOINT_PATH": work / "start",
        "SAVE_CHECKPOINT_PATH": work / name, "SEQ_LENGTH": 96, "EVAL_INTERVAL": 0, "TUNER": "lora", "PRECISION": "fp32",
        **more,
    }  # fmt: skip


def pefts_gradients(work: Path, peft: Path, *, packing: bool = True) -> tuple[float, dict[str, torch.Tensor]]:
    """PEFT's loss of the first batch, and the gradient of each of its matrices by their names in its files."""
    model: Any = Qwen2ForCausalLM.from_pretrained(work / "qwen").float()
    model = PeftModel.from_pretrained(model, peft, is_trainable=True).float()
    loss = hf_loss(model, work, 0, packing=packing)
    loss.backward()
    found = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
    return loss.item(), found


def our_gradients(work: Path, name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of a run's first step: Adam's first moment is then (1 - beta1) times the gradient."""
    reader = TorchDistReader(work / name / "iter_0000001")
    name_of_moment = re.compile(r"optimizer\.state\.exp_avg\.decoder\.layers\.(\w+)\.\w+\.adapters\.(\w+\.lora_\w)")
    found = {}
    for key in reader.tensors:
        if match := name_of_moment.fullmatch(key):
            part = {"self_attention": "self_attn", "mlp": "mlp"}[match[1]]
            for layer, moment in enumerate(reader.read(key)):
                found[f"base_model.model.model.layers.{layer}.{part}.{match[2]}.weight"] = moment / (1 - 0.9)
    (first, *_) = [row for row in read_metrics(work / name) if "loss" in row]
    return first["loss"], found


def difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of a gradient, relative to that gradient's largest value."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp": {"GPUS": 2},
    "tp": {"TP": 2, "GPUS": 2, "RECOMPUTE": "full"},
    "vpp": {"PP": 2, "VPP": 2, "GPUS": 2},
    "padded": {"TP": 2, "PP": 2, "GPUS": 4, "PACKING": "false"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_pefts(work: Path, peft: Path, layout: str) -> None:
    more = {"TRAIN_ITERS": 1, "CLIP_GRAD": 0, "LORA_ADAPTER": peft, "TRUNCATE": "error", **LAYOUTS[layout]}
    step3_forked(settings(work, layout, **more))
    loss, mine = our_gradients(work, layout)
    their_loss, theirs = pefts_gradients(work, peft, packing="PACKING" not in more)
    assert abs(loss - their_loss) <= BOUND * their_loss
    assert difference(mine, theirs) <= BOUND


def test_without_sequence_parallelism_too(work: Path, peft: Path) -> None:
    """Not a setting of the scripts, but of Python."""
    log = train_forked(
        train_mode="finetune", dataset_path=work / "sft", load_checkpoint_path=work / "start", seq_length=96,
        save_checkpoint_path=work / "no_sp", eval_interval=0, tuner="lora", lora_adapter=peft, precision="fp32",
        train_iters=1, clip_grad=0, tp=2, gpus=2, global_batch_size=8, sequence_parallel="false", log_interval=1,
        ckpt_format="torch_dist",
    )  # fmt: skip
    assert "TP 2" in log
    assert difference(our_gradients(work, "no_sp")[1], pefts_gradients(work, peft)[1]) <= BOUND


def other_alpha(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["lora_alpha"] = 11


def exchange(one: str, other: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def mutant(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if f".{one}." in name]:
            twin = name.replace(f".{one}.", f".{other}.")
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return mutant


def swap_heads(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    heads = tensors[name].unflatten(0, (4, 16)).clone()
    tensors[name] = heads[[2, 1, 0, 3]].flatten(0, 1)


def halve_one(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"].mul_(0.5)


MUTANTS = {
    "alpha": other_alpha, "k for v": exchange("k_proj", "v_proj"), "gate for up": exchange("gate_proj", "up_proj"),
    "heads": swap_heads, "one halved": halve_one, "layers": exchange("1", "2"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_is_far_outside_the_bound(work: Path, peft: Path, mutant: str) -> None:
    wrong = work / f"peft_{mutant}"
    shutil.copytree(peft, wrong)
    tensors = load_file(peft / "adapter_model.safetensors")
    config = json.loads((peft / "adapter_config.json").read_text())
    MUTANTS[mutant](tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, wrong / "adapter_model.safetensors")
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    _, expected = pefts_gradients(work, peft)
    _, found = pefts_gradients(work, wrong)
    assert difference(found, expected) > 100 * BOUND


@pytest.fixture(scope="module")
def run_of_six(work: Path) -> Path:
    """A run of six steps with dropout by the script's defaults, bf16 included, with a checkpoint after three."""
    given = settings(work, "six", PRECISION="bf16", LORA_DROPOUT=0.1, GPUS=2, SAVE_INTERVAL=3, TRAIN_ITERS=6)
    step3(given, work / "six.log")
    return work / "six"


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(checkpoint)
    return {key: reader.read(key) for key in reader.tensors}


def resumed(work: Path, run_of_six: Path, name: str, **more: Any) -> str:
    """The log of a run that goes on from the six's third step."""
    shutil.copytree(run_of_six, work / name)
    shutil.rmtree(work / name / "iter_0000006")
    (work / name / "latest_checkpointed_iteration.txt").write_text("3\n")
    given = settings(work, name, PRECISION="bf16", LORA_DROPOUT=0.1, GPUS=2, SAVE_INTERVAL=3, TRAIN_ITERS=6)
    return step3_forked({**given, **more})


def test_checkpoints_hold_the_adapter_alone_and_resume_bit_for_bit(work: Path, run_of_six: Path) -> None:
    resumed(work, run_of_six, "resumed")
    before, after = tensors_of(run_of_six / "iter_0000006"), tensors_of(work / "resumed" / "iter_0000006")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(".adapters." in key for key in before) and len(before) == 4 * 2 * len(MODULES)
    expected = checkpoint_bytes(load_config(work / "qwen"), "bf16", lora=LORA)
    assert expected <= size_of(run_of_six / "iter_0000006") <= 1.02 * expected + 400_000  # names and shapes
    first = tensors_of(run_of_six / "iter_0000003")
    assert all(not torch.equal(first[key], before[key]) for key in before)


def test_a_checkpoint_loads_at_another_layout(work: Path, peft: Path) -> None:
    whole = settings(work, "whole", LORA_ADAPTER=peft, SAVE_INTERVAL=2, TRAIN_ITERS=4)
    expected = steps(step3_forked(whole))
    shutil.copytree(work / "whole", work / "moved")
    (work / "moved" / "latest_checkpointed_iteration.txt").write_text("2\n")
    given = settings(work, "moved", TP=2, PP=2, GPUS=4, TRAIN_ITERS=4)
    found = steps(step3_forked(given))
    assert [step[0] for step in found] == [3, 4]
    assert np.allclose(found, expected[2:], rtol=1e-5)


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_an_exported_adapter_gives_the_next_step_its_loss(work: Path, ckpt_format: str) -> None:
    """By PEFT from EXPORT=adapter, and by transformers from the merged folder; saved at TP2 PP2."""
    name = f"exported_{ckpt_format}"
    given = settings(work, name, TP=2, PP=2, GPUS=4, CKPT_FORMAT=ckpt_format, SAVE_INTERVAL=2, TRAIN_ITERS=3)
    load: dict[str, Any] = {"LOAD_CHECKPOINT_PATH": work / "start_2_2"}
    if ckpt_format == "torch":
        to_megatron(work / "qwen", work / "start_2_2", tp=2, pp=2, ckpt_format="torch", transformer_impl="local")
    log = steps(step3_forked({**given, **(load if ckpt_format == "torch" else {})}))
    for kind in ("adapter", "merged"):
        flags = {"load_checkpoint_path": work / name / "iter_0000002", "save_checkpoint_path": work / f"{name}_{kind}"}
        convert("megatron-to-hf", **flags, export=kind)
    model: Any = Qwen2ForCausalLM.from_pretrained(work / "qwen").float()
    merged: Any = Qwen2ForCausalLM.from_pretrained(work / f"{name}_merged").float()
    adapted = PeftModel.from_pretrained(model, work / f"{name}_adapter")
    with torch.no_grad():
        found = [hf_loss(each, work, 2).item() for each in (adapted, merged)]
        with adapted.disable_adapter():
            without = hf_loss(adapted, work, 2).item()
    assert np.allclose(found, log[2][1], rtol=2e-6), (found, log)
    assert abs(without - log[2][1]) > 1e-3
    assert sorted(path.name for path in (work / f"{name}_adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip


def test_every_command_says_what_an_adapter_is(work: Path, peft: Path, run_of_six: Path) -> None:
    shown = forked(0, "common.convert", ["inspect", str(run_of_six)])
    assert f"LoRA adapter: rank 16, alpha 32, {', '.join(MODULES)}; of {work / 'start' / 'release'}" in shown
    log = convert("verify", 2, hf_model_path=work / "qwen", load_checkpoint_path=run_of_six)
    assert "holds a LoRA adapter of" in log
    log = convert("megatron-to-hf", 2, load_checkpoint_path=run_of_six, save_checkpoint_path=work / "none", average=2)
    assert "the mean of adapters is not the adapter of the mean" in log
    whole = {"load_checkpoint_path": work / "start", "save_checkpoint_path": work / "none"}
    assert "holds whole weights: set EXPORT=merged" in convert("megatron-to-hf", 2, **whole, export="adapter")
    assert "LORA_ADAPTER" in convert("hf-to-megatron", 2, load_checkpoint_path=peft, save_checkpoint_path=work / "none")
    assert "EXPORT=merged" in forked(0, "common.chat", [f"--hf-model-path={peft}"], 2)
    assert not (work / "none").exists()


def test_export_hf_writes_the_adapter_beside_training(work: Path) -> None:
    step3_forked(settings(work, "beside", EXPORT_HF="last", SAVE_INTERVAL=2, TRAIN_ITERS=4))
    last = work / "beside" / "hf" / "last"
    assert sorted(path.name for path in last.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert last.resolve().name == "iter_0000004"


def test_some_targets_leave_the_others_alone(work: Path) -> None:
    step3_forked(settings(work, "some", LORA_TARGETS="v_proj,up_proj", LORA_RANK=2, TP=2, GPUS=2, TRAIN_ITERS=2))
    flags = {"load_checkpoint_path": work / "some", "save_checkpoint_path": work / "some_merged"}
    convert("megatron-to-hf", **flags)
    before, after = (load_file(work / name / "model.safetensors") for name in ("qwen", "some_merged"))
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"v_proj", "up_proj"}


def convert(command: str, code: int = 0, **flags: Any) -> str:
    """The log of `python -m common.convert`."""
    return forked(0, "common.convert", [command, *words(flags)], code)


def refuse(work: Path, words: str, **more: Any) -> None:
    log = step3_forked(settings(work, more.pop("name", "refused"), TRAIN_ITERS=2, **more), code=2)
    assert words in log, log[-3000:]


def test_what_contradicts_an_adapter_is_refused_by_name(work: Path, peft: Path, run_of_six: Path) -> None:
    refuse(work, "LORA_RANK=8 is for TUNER=lora", TUNER="full", LORA_RANK=8)
    refuse(work, "LORA_TARGETS=q_proj,lm_head: give all-linear", LORA_TARGETS="q_proj,lm_head")
    refuse(work, "LORA_RANK=8: the adapter that the run continues has 4", LORA_ADAPTER=peft, LORA_RANK=8)
    refuse(work, "set LOAD_CHECKPOINT_PATH", LOAD_CHECKPOINT_PATH="", HF_MODEL_PATH=work / "qwen")
    refuse(work, "OPTIMIZER_STATE=cpu_bf16 with TUNER=lora", OPTIMIZER_STATE="cpu_bf16", PRECISION="bf16")
    refuse(work, "set TUNER=lora to resume", name="six", TUNER="full", GPUS=2)
    refuse(work, "holds a LoRA adapter of", LOAD_CHECKPOINT_PATH=run_of_six)
    refuse(work, "export it with EXPORT=merged", LOAD_CHECKPOINT_PATH=run_of_six, TUNER="full")
    dora = write_adapter(work, work / "dora", use_dora=True)
    refuse(work, "use_dora is True", LORA_ADAPTER=dora)


def test_another_base_is_refused_and_a_moved_one_is_found(work: Path, run_of_six: Path) -> None:
    other = shutil.copytree(work / "start", work / "other_start")
    (data,) = other.glob("release/*.distcp")
    content = bytearray(data.read_bytes())
    content[200] ^= 1
    data.write_bytes(content)
    refuse(work, "does not hold the weights that", name="six", LOAD_CHECKPOINT_PATH=other, GPUS=2, PRECISION="bf16")
    moved = shutil.copytree(work / "start", work / "moved_start")
    log = resumed(work, run_of_six, "with_moved", LOAD_CHECKPOINT_PATH=moved)
    assert str(moved) in log and [step[0] for step in steps(log)] == [4, 5, 6]
