"""A small Qwen2.5 or Qwen3 with random weights, as a Hugging Face folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Shape:
    """Sizes under Hugging Face's names."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int = 512
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 512
    rope_theta: float = 1000000.0
    model_type: str = "qwen2"
    head_dim: int | None = None  # hidden_size / num_attention_heads


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name to shape of each tensor of `Qwen2ForCausalLM` (transformers models/qwen2/modeling_qwen2.py) or Qwen3's.

    Qwen2 has biases on query, key and value, Qwen3 norms on each head of query and key instead.
    """
    h, f = shape.hidden_size, shape.intermediate_size
    d = shape.head_dim or h // shape.num_attention_heads
    q, kv = shape.num_attention_heads * d, shape.num_key_value_heads * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, h)}
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (h,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
            if shape.model_type == "qwen2":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        if shape.model_type == "qwen3":
            shapes[layer + "self_attn.q_norm.weight"] = shapes[layer + "self_attn.k_norm.weight"] = (d,)
        shapes[layer + "self_attn.o_proj.weight"] = (h, q)
        shapes[layer + "post_attention_layernorm.weight"] = (h,)
        shapes[layer + "mlp.gate_proj.weight"] = shapes[layer + "mlp.up_proj.weight"] = (f, h)
        shapes[layer + "mlp.down_proj.weight"] = (h, f)
    shapes["model.norm.weight"] = (h,)
    if not shape.tie_word_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, h)
    return shapes


def random_weights(shape: Shape, std: float, seed: int, spread: float = 0.0) -> dict[str, torch.Tensor]:
    """Float32 tensors: matrices normal with `std`; norms 1 and biases 0, both plus normal noise of `spread`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in tensor_shapes(shape).items():
        noise = torch.randn(size, generator=generator)
        if len(size) == 2:
            weights[name] = std * noise
        else:
            weights[name] = spread * noise + (1.0 if "norm" in name else 0.0)
    return weights


def write_model(
    folder: Path,
    shape: Shape,
    tokenizer: Tokenizer,
    *,
    std: float = 0.02,
    seed: int = 0,
    spread: float = 0.0,
    dtype: str = "float32",
) -> None:
    """Writes `config.json`, `generation_config.json` and `model.safetensors` of a random model to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    weights = random_weights(shape, std, seed, spread)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": [f"{shape.model_type.capitalize()}ForCausalLM"],
        **{name: value for name, value in shape.__dict__.items() if value is not None},
        "attention_dropout": 0.0,
        "eos_token_id": end,
        "bos_token_id": pad,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "torch_dtype": dtype,
        "use_sliding_window": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": False, "eos_token_id": end, "pad_token_id": pad}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
