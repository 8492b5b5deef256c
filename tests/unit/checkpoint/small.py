"""A Qwen2.5 of a few numbers, and its Megatron checkpoints put together by hand: nothing here is the kit's own code.

h hidden_size, d head_dim, n attention heads, g key-value groups.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save_state_dict

from common.model.shape.config import QwenConfig, load_config

SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 11,
    "tie_word_embeddings": False,
}
QWEN = QwenConfig(
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=5,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=16,
    head_dim=1,
    dtype="float32",
)


def save_with_torch(state: Mapping[str, Any], folder: Path) -> None:
    """Writes `state` in torch_dist as one process, with torch's own code: torch 2.3's `save` takes no `no_dist`."""
    save_state_dict(dict(state), FileSystemWriter(folder), no_dist=True)


def write_hf(folder: Path, seed: int = 0, **shape: int | bool | str) -> tuple[QwenConfig, dict[str, Tensor]]:
    """A Hugging Face folder of random numbers: config.json and model.safetensors; its config and its tensors."""
    values = {**SHAPE, "model_type": "qwen2", **shape, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    folder.mkdir(parents=True, exist_ok=True)
    config = {**values, "max_position_embeddings": 16, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    qwen = load_config(folder)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(size, generator=generator) for name, size in hf_sizes(qwen).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return qwen, weights


def hf_sizes(qwen: QwenConfig) -> dict[str, tuple[int, ...]]:
    h, f, v = qwen.hidden_size, qwen.intermediate_size, qwen.vocab_size
    q, kv = qwen.num_attention_heads * qwen.head_dim, qwen.num_key_value_heads * qwen.head_dim
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    for i in range(qwen.num_hidden_layers):
        layer = {
            "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (q, h), "self_attn.k_proj.weight": (kv, h), "self_attn.v_proj.weight": (kv, h),
            "self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (h, q),
            "mlp.gate_proj.weight": (f, h), "mlp.up_proj.weight": (f, h), "mlp.down_proj.weight": (h, f),
        }  # fmt: skip
        if qwen.qk_norm:
            layer |= {"self_attn.q_norm.weight": (qwen.head_dim,), "self_attn.k_norm.weight": (qwen.head_dim,)}
        if not qwen.qkv_bias:
            layer = {name: size for name, size in layer.items() if not name.endswith("bias")}
        sizes |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    if not qwen.tie_word_embeddings:
        sizes["lm_head.weight"] = (v, h)
    return sizes


def megatron_state(
    weights: dict[str, Tensor], qwen: QwenConfig, layers: range, *, first: bool, last: bool,
    impl: str = "transformer_engine", tp_rank: int = 0, tp: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """One chunk's flat state dict: `layers` counted from 0, the embedding where `first`, the output where `last`."""
    state: dict[str, Tensor] = {}
    if first:
        state["embedding.word_embeddings.weight"] = part_of_vocabulary(
            weights["model.embed_tokens.weight"], tp_rank, tp
        )
    for position, i in enumerate(layers):
        layer = layer_state(weights, qwen, i, impl, tp_rank, tp)
        state |= {f"decoder.layers.{position}.{name}": tensor for name, tensor in layer.items()}
    if last:
        state["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
        head = weights["model.embed_tokens.weight" if qwen.tie_word_embeddings else "lm_head.weight"]
        if not (first and qwen.tie_word_embeddings):
            state["output_layer.weight"] = part_of_vocabulary(head, tp_rank, tp)
    return {name: tensor.clone() for name, tensor in state.items()}


def layer_state(
    weights: dict[str, Tensor], qwen: QwenConfig, i: int, impl: str, tp_rank: int, tp: int
) -> dict[str, Tensor]:
    """The tensors of layer `i` by their names within the layer."""
    d, heads_a_group = qwen.head_dim, qwen.num_attention_heads // qwen.num_key_value_heads
    hf = {name.split(".", 3)[3]: tensor for name, tensor in weights.items() if name.startswith(f"model.layers.{i}.")}
    groups = qwen.num_key_value_heads // tp
    fused: dict[str, list[Tensor]] = {"weight": [], "bias": []} if qwen.qkv_bias else {"weight": []}
    for kind, rows in fused.items():
        for group in range(tp_rank * groups, (tp_rank + 1) * groups):
            for head in range(group * heads_a_group, (group + 1) * heads_a_group):
                rows.append(hf[f"self_attn.q_proj.{kind}"][head * d : (head + 1) * d])
            rows.append(hf[f"self_attn.k_proj.{kind}"][group * d : (group + 1) * d])
            rows.append(hf[f"self_attn.v_proj.{kind}"][group * d : (group + 1) * d])
    f, q = qwen.intermediate_size // tp, qwen.num_attention_heads * d // tp
    mine = slice(tp_rank * f, (tp_rank + 1) * f)
    te = impl == "transformer_engine"
    extras = {"self_attention.linear_qkv.bias": torch.cat(fused["bias"])} if qwen.qkv_bias else {}
    if qwen.qk_norm:
        extras |= {f"self_attention.{part}_layernorm.weight": hf[f"self_attn.{part}_norm.weight"] for part in "qk"}
    return {
        "self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight": hf["input_layernorm.weight"],
        "self_attention.linear_qkv.weight": torch.cat(fused["weight"]),
        **extras,
        "self_attention.linear_proj.weight": hf["self_attn.o_proj.weight"][:, tp_rank * q : (tp_rank + 1) * q],
        "mlp.linear_fc1.layer_norm_weight" if te else "pre_mlp_layernorm.weight": hf["post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([hf["mlp.gate_proj.weight"][mine], hf["mlp.up_proj.weight"][mine]]),
        "mlp.linear_fc2.weight": hf["mlp.down_proj.weight"][:, mine],
    }


def part_of_vocabulary(weight: Tensor, tp_rank: int, tp: int) -> Tensor:
    """Equal parts, rows of zeros after the last word."""
    padded = torch.cat([weight, weight.new_zeros(-len(weight) % tp, weight.shape[1])])
    return padded.chunk(tp)[tp_rank]


def write_ranks(
    path: Path, weights: dict[str, Tensor], qwen: QwenConfig, stages: list[list[range]],
    *, tp: int = 1, impl: str = "transformer_engine",
) -> Path:  # fmt: skip
    """A checkpoint in torch format: `stages[p][v]` are the layers of chunk v on pipeline rank p."""
    for tp_rank in range(tp):
        for stage, chunks in enumerate(stages):
            content: dict[str, object] = {"checkpoint_version": 3.0, "iteration": 0}
            for v, layers in enumerate(chunks):
                first, last = stage == v == 0, stage == len(stages) - 1 and v == len(chunks) - 1
                content["model" if len(chunks) == 1 else f"model{v}"] = megatron_state(
                    weights, qwen, layers, first=first, last=last, impl=impl, tp_rank=tp_rank, tp=tp
                )
            name = f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if len(stages) > 1 else "")
            (path / name).mkdir(parents=True, exist_ok=True)
            torch.save(content, path / name / "model_optim_rng.pt")
    return path


def joined(parts: Iterable[Sequence[Tensor]]) -> Tensor:
    """The tensor of rows of blocks: each row's blocks side by side, the rows one below the other."""
    return torch.cat([torch.cat(list(beside), dim=-1) for beside in parts])


def bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype and every bit agree, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def dist_state(weights: dict[str, Tensor], qwen: QwenConfig, *, stacked: bool = True) -> dict[str, Tensor]:
    """The tensors of a torch_dist checkpoint: whole, those of the layers stacked or numbered."""
    layers = range(qwen.num_hidden_layers)
    state = megatron_state(weights, qwen, layers, first=True, last=True)
    if stacked:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.layers.")}
        each = [layer_state(weights, qwen, i, "transformer_engine", 0, 1) for i in layers]
        state |= {f"decoder.layers.{name}": torch.stack([layer[name] for layer in each]) for name in each[0]}
    return state
