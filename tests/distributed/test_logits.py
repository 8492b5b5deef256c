"""The converted model, as Megatron-Core runs it, against Hugging Face's on the same tokens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from tests.conversion import to_megatron
from tests.distributed.launch import worker
from tests.tiny import tiny_qwen

LAYOUTS = [(1, 1), (2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.lane)]
BOUND = 1e-5  # of the largest logit; weights of std 0.1, where Hugging Face's own attentions differ by 4.6e-6
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, tied and untied, and a batch."""
    folder = tmp_path_factory.mktemp("logits")
    tiny_qwen(folder / "tied", std=0.1, spread=0.1)
    tiny_qwen(folder / "untied", std=0.1, spread=0.1, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.save({"tokens": torch.randint(0, 512, (2, 64))}, folder / "batch.pt")
    return folder


def hugging_face_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        return model(tokens).logits


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    assert mine.shape == theirs.shape
    return float((mine - theirs).abs().max() / theirs.abs().max())


def megatron_logits(work: Path, tp: int, pp: int, checkpoints: list[Path], **more: Any) -> list[torch.Tensor]:
    runs = [{"load": str(path), "out": str(work / f"{path.name}.pt")} for path in checkpoints]
    settings: dict[str, Any] = {"tp": tp, "pp": pp, "gpus": tp * pp, "seq_length": 64, "micro_batch_size": 2}
    settings |= {"global_batch_size": 2, "precision": "fp32", **more}
    worker(tp * pp, {"settings": settings, "batch": str(work / "batch.pt"), "runs": runs})
    return [torch.load(run["out"]) for run in runs]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_layout_gives_hugging_faces_logits(work: Path, tp: int, pp: int) -> None:
    checkpoints, models = [], []
    for model in ("tied", "untied"):
        for ckpt_format in ("torch", "torch_dist"):
            target = work / f"{model}_{ckpt_format}_{tp}_{pp}"
            impl = "local" if model == "tied" else "transformer_engine"
            to_megatron(work / model, target, tp=tp, pp=pp, ckpt_format=ckpt_format, transformer_impl=impl)
            checkpoints.append(target)
            models.append(model)
    tokens = torch.load(work / "batch.pt")["tokens"]
    expected = {model: hugging_face_logits(work / model, tokens) for model in ("tied", "untied")}
    for model, path, mine in zip(models, checkpoints, megatron_logits(work, tp, pp, checkpoints), strict=True):
        assert difference(mine, expected[model]) <= BOUND, path.name


def test_qwen3_gives_hugging_faces_logits(work: Path) -> None:
    folder = tiny_qwen(work / "hf_qwen3", std=0.1, spread=0.1, model_type="qwen3", head_dim=32)
    tokens = torch.load(work / "batch.pt")["tokens"]
    (mine,) = megatron_logits(work, 2, 1, [to_megatron(folder, work / "qwen3", tp=2, transformer_impl="local")])
    assert difference(mine, hugging_face_logits(folder, tokens)) <= BOUND


@pytest.mark.parametrize(
    ("pp", "vpp", "layers"),
    # Megatron-Core's two ways to have them.
    [(3, 1, "1,2,1"), (3, 1, "2,1,1"), pytest.param(2, 1, "1,3", marks=pytest.mark.lane), (2, 2, "2,1,1,2")],
)
def test_stages_of_other_sizes_give_the_same_logits(work: Path, pp: int, vpp: int, layers: str) -> None:
    model = work / "untied"
    if vpp > 1:
        model = tiny_qwen(work / "hf_six", std=0.1, spread=0.1, tie_word_embeddings=False, num_hidden_layers=6)
    checkpoints = []
    for ckpt_format in ("torch", "torch_dist"):
        target = work / f"{ckpt_format}_{layers}"
        options = {"pp": pp, "vpp": vpp, "pipeline_layers": layers, "transformer_impl": "local"}
        checkpoints.append(to_megatron(model, target, ckpt_format=ckpt_format, **options))
    expected = hugging_face_logits(model, torch.load(work / "batch.pt")["tokens"])
    batch = {"global_batch_size": 2 * pp} if vpp > 1 else {}
    for mine in megatron_logits(work, 1, pp, checkpoints, vpp=vpp, pipeline_layers=layers, **batch):
        assert difference(mine, expected) <= BOUND


def test_yarn_gives_hugging_faces_logits(work: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    folder = mutate(work / "untied", work / "hf_yarn", None, {"rope_scaling": scaling, "max_position_embeddings": 64})
    tokens = torch.load(work / "batch.pt")["tokens"]
    expected = hugging_face_logits(folder, tokens)
    assert difference(hugging_face_logits(work / "untied", tokens), expected) > 100 * BOUND
    (mine,) = megatron_logits(work, 2, 1, [to_megatron(folder, work / "yarn", tp=2, transformer_impl="local")])
    assert difference(mine, expected) <= BOUND


def swap_heads(weights: Weights) -> None:
    q = weights["model.layers.1.self_attn.q_proj.weight"].unflatten(0, (4, 16))
    q[[0, 2]] = q[[2, 0]].clone()


def lose_bias(weights: Weights) -> None:
    weights["model.layers.0.self_attn.k_proj.bias"].zero_()


def lose_query_bias(weights: Weights) -> None:
    weights["model.layers.3.self_attn.q_proj.bias"].zero_()


def exchange_gate_and_up(weights: Weights) -> None:
    gate, up = (weights[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    kept = gate.clone()
    gate.copy_(up)
    up.copy_(kept)


def neighbours_norm(weights: Weights) -> None:
    weights["model.layers.0.input_layernorm.weight"].copy_(weights["model.layers.1.input_layernorm.weight"])


def exchange_norms(weights: Weights) -> None:
    weights["model.layers.2.input_layernorm.weight"].copy_(weights["model.layers.2.post_attention_layernorm.weight"])


WEIGHT_MUTANTS: list[Callable[[Weights], None]] = [
    swap_heads, lose_bias, lose_query_bias, exchange_gate_and_up, neighbours_norm, exchange_norms,
]  # fmt: skip
CONFIG_MUTANTS = {"wrong RoPE base": {"rope_theta": 10000.0}, "wrong epsilon": {"rms_norm_eps": 1e-5}}


def mutate(source: Path, target: Path, weights: Callable[[Weights], None] | None, config: dict[str, Any]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    if weights:
        weights(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return target


def test_each_mutant_is_far_outside_the_bound(work: Path) -> None:
    tokens = torch.load(work / "batch.pt")["tokens"]
    expected = hugging_face_logits(work / "untied", tokens)
    names = [mutant.__name__ for mutant in WEIGHT_MUTANTS] + list(CONFIG_MUTANTS)
    folders = [mutate(work / "untied", work / f"hf_{m.__name__}", m, {}) for m in WEIGHT_MUTANTS]
    folders += [mutate(work / "untied", work / f"hf_{name}", None, change) for name, change in CONFIG_MUTANTS.items()]
    for folder in folders:
        to_megatron(folder, work / folder.name[3:])
    found = megatron_logits(work, 1, 1, [work / name for name in names])
    differences = {name: difference(mine, expected) for name, mine in zip(names, found, strict=True)}
    assert all(value >= 10 * BOUND for value in differences.values()), differences


@pytest.mark.lane
def test_loss_and_gradients_are_hugging_faces(work: Path) -> None:
    batch = {"tokens": torch.load(work / "batch.pt")["tokens"]}
    batch["labels"] = batch["tokens"].roll(-1, 1)
    batch["loss_mask"] = (torch.rand(2, 64) < 0.5).float()
    torch.save(batch, work / "grads.pt")
    to_megatron(work / "tied", work / "for_grads")
    settings = {"seq_length": 64, "micro_batch_size": 1, "global_batch_size": 2, "precision": "fp32"}
    runs = [{"load": str(work / "for_grads"), "out": str(work / "grads_out.pt"), "gradients": True}]
    worker(1, {"settings": settings, "batch": str(work / "grads.pt"), "runs": runs})
    mine = torch.load(work / "grads_out.pt")

    model = Qwen2ForCausalLM.from_pretrained(work / "tied").float()
    logits = model(batch["tokens"]).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
    loss = (losses * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
    loss.backward()
    assert abs(mine["loss"] - loss.item()) < 1e-5
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mapped = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
    }
    for i in range(4):
        hf, megatron = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (theirs[f"{hf}self_attn.{name}_proj.weight"] for name in "qkv")
        rows = [q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]]  # 2 groups of 2 query heads of 16
        mapped[f"{megatron}self_attention.linear_qkv.weight"] = torch.cat(rows)
        q, k, v = (theirs[f"{hf}self_attn.{name}_proj.bias"] for name in "qkv")
        mapped[f"{megatron}self_attention.linear_qkv.bias"] = torch.cat(
            [q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]]
        )
        mapped[f"{megatron}self_attention.linear_proj.weight"] = theirs[f"{hf}self_attn.o_proj.weight"]
        gate_up = [theirs[f"{hf}mlp.gate_proj.weight"], theirs[f"{hf}mlp.up_proj.weight"]]
        mapped[f"{megatron}mlp.linear_fc1.weight"] = torch.cat(gate_up)
        mapped[f"{megatron}mlp.linear_fc2.weight"] = theirs[f"{hf}mlp.down_proj.weight"]
        mapped[f"{megatron}input_layernorm.weight"] = theirs[f"{hf}input_layernorm.weight"]
        mapped[f"{megatron}pre_mlp_layernorm.weight"] = theirs[f"{hf}post_attention_layernorm.weight"]
    assert mapped.keys() == mine["gradients"].keys()
    for name, expected in mapped.items():
        assert difference(mine["gradients"][name], expected) < 1e-4, name
