"""Writes checkpoints as others do, in a separate process: classes that only they have, Megatron-Core's own saving.

    python -m tests.unit.checkpoint.foreign (megatron-lm | pai | stacked | numbered) WEIGHTS FOLDER

WEIGHTS is a folder of `small.write_hf`; FOLDER becomes the checkpoint's.
"""

import enum
import io
import random
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.engine.patches import add_numpy_dtypes
from common.model.shape.config import QwenConfig, load_config
from tests.unit.checkpoint.small import write_ranks

TRACKER = "latest_checkpointed_iteration.txt"
PADDED = 128


def foreign_class(module: str, name: str, base: type = object, **members: Any) -> Any:
    """A class of a module that the reader does not have."""
    made = base(name, members, module=module) if base is enum.Enum else type(name, (base,), members)
    made.__module__ = module
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module], name, made)
    return made


def arguments(qwen: QwenConfig, **more: Any) -> Namespace:
    """As Megatron-LM's parse_args gives them: numbers, dtypes, enums, functions, classes of its own."""
    kind = foreign_class("megatron.training.kinds", "TokenizerType", enum.Enum, HF=1)
    timers = foreign_class("megatron.training.timers", "TimersOptions")()
    timers.level = 2
    return Namespace(
        num_layers=qwen.num_hidden_layers, hidden_size=qwen.hidden_size, padded_vocab_size=PADDED,
        params_dtype=torch.bfloat16,
        activation_func=torch.nn.functional.silu, tokenizer_type=kind.HF, timers=timers, consumed_train_samples=640,
        save=Path("/mnt/checkpoints"), tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
        iteration=20, rampup_batch_size=None, world_size=4, **more,
    )  # fmt: skip


def fp8_state() -> io.BytesIO:
    """As Transformer Engine before 1.0 stores it."""
    stream = io.BytesIO()
    torch.save({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}, stream)
    return stream


def padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, torch.randn(rows - len(tensor), tensor.shape[1])])


def write_rank_files(kind: str, weights: dict[str, Tensor], qwen: QwenConfig, folder: Path) -> None:
    """`pai`: as the legacy kit, `_extra_state` None, weights alone; `megatron-lm`: the full state of a run."""
    full = {
        name: padded(tensor, PADDED) if tensor.shape[0] == qwen.vocab_size else tensor
        for name, tensor in weights.items()
    }
    release = folder / ("release" if kind == "pai" else "iter_0000020")
    write_ranks(release, full, qwen, [[range(2)], [range(2, 4)]], tp=2)
    (folder / TRACKER).write_text("release" if kind == "pai" else "20")
    for path in release.glob("mp_rank_*/model_optim_rng.pt"):
        state = torch.load(path)
        names = [
            f"decoder.layers.{i}.self_attention.{part}._extra_state"
            for i in range(2)
            for part in ("linear_qkv", "core")
        ]
        state["model"] |= dict.fromkeys(names, None if kind == "pai" else fp8_state())
        if kind == "pai":
            state["args"] = arguments(qwen, hf_ckpt_path="/mnt/qwen", target_tensor_model_parallel_size=2)
        else:
            state["args"] = arguments(qwen)
            optimizer = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}}
            generators = {"random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state()}
            state |= {"optimizer": optimizer, "rng_state": [{**generators, "torch_rng_state": torch.get_rng_state()}]}
            state |= {
                "opt_param_scheduler": {"max_lr": numpy.float64(1e-4)},
                "num_floating_point_operations_so_far": 0.0,
            }
        torch.save(state, path)


def prepare_torch() -> None:
    """Lets Megatron-Core build a model with RMSNorm where torch has none (before 2.4): its weight is LayerNorm's."""
    add_numpy_dtypes()
    if not hasattr(torch.nn, "RMSNorm"):
        from megatron.core.transformer import torch_norm

        torch_norm.is_torch_min_version = lambda *_: True
        torch.nn.RMSNorm = lambda normalized_shape, eps: torch.nn.LayerNorm(normalized_shape, eps, bias=False)


def write_torch_dist(numbered: bool, weights: dict[str, Tensor], qwen: QwenConfig, folder: Path) -> None:
    """Megatron-Core's GPTModel by its own sharded_state_dict and dist_checkpointing, with an optimizer's tensor."""
    prepare_torch()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from tests.unit.checkpoint.small import megatron_state

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.cuda.synchronize = lambda: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    config = TransformerConfig(
        num_layers=4, hidden_size=8, ffn_hidden_size=8, num_attention_heads=4, num_query_groups=2, add_qkv_bias=True,
        add_bias_linear=False, gated_linear_unit=True, use_cpu_initialization=True, normalization="RMSNorm",
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), PADDED, 16, position_embedding_type="rope"
    )
    state = megatron_state(weights, qwen, range(4), first=True, last=True, impl="local")
    rows = {name: padded(tensor, PADDED) for name, tensor in state.items() if tensor.shape[0] == qwen.vocab_size}
    missing = model.load_state_dict(state | rows, strict=False)
    assert not missing.unexpected_keys and all("_extra_state" in key for key in missing.missing_keys), missing
    metadata = {"non_homogeneous_layers": True} if numbered else None
    shards = dict(model.sharded_state_dict(metadata=metadata))
    bias = "decoder.layers.0.self_attention.linear_qkv.bias"
    moment = ShardedTensor.from_rank_offsets(f"optimizer.state.exp_avg.{bias}", torch.ones(16))
    common = {
        "args": arguments(qwen),
        "checkpoint_version": 3.0,
        "iteration": 20,
        "num_floating_point_operations_so_far": 1.0,
    }
    path = folder / "iter_0000020"
    path.mkdir(parents=True)
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save({**common, "model": shards, "moment": moment}, str(path), strategy)
    (folder / TRACKER).write_text("20")


def main() -> None:
    kind, source, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    weights, qwen = load_file(source / "model.safetensors"), load_config(source)
    if kind in ("megatron-lm", "pai"):
        write_rank_files(kind, weights, qwen, folder)
    else:
        write_torch_dist(kind == "numbered", weights, qwen, folder)


if __name__ == "__main__":
    main()
