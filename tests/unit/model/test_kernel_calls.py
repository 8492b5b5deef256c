"""Where kernels of SwiGLU, the MLP, QKV and norms are called: with plain PyTorch there, a model gives the same."""

import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from common.engine import patches
from common.engine.installation import prepare
from common.engine.versions import installed_engine
from common.model.shape.config import QwenConfig, load_config
from common.parallel import ParallelSizes
from common.platforms import PLATFORMS
from common.ports import free_port
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[3]
CPU = PLATFORMS["cpu"]
S, B = 24, 2


@pytest.mark.lane
@pytest.mark.parametrize("tp", [1, 2])
def test_a_model_with_other_code_in_these_places_is_the_same(tmp_path: Path, tp: int) -> None:
    """With TP 2 each rank norms its part of the sequence; the output layer has a weight of its own there."""
    tiny_qwen(tmp_path, std=0.2, tie_word_embeddings=tp == 1)
    group = {"WORLD_SIZE": str(tp), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.model.test_kernel_calls", str(tmp_path)], cwd=ROOT, text=True,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(tp)
    ]  # fmt: skip
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "".join(printed)


def outputs(qwen: QwenConfig, sizes: ParallelSizes, recompute: str = "none") -> list[torch.Tensor]:
    """The logits of a model with weights of one seed, and their gradients by weight."""
    from common.model.build import ModelOptions, build_model

    torch.manual_seed(1)
    (model,) = build_model(qwen, sizes, ModelOptions("fp32", "local", recompute), CPU, S)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == 2 * qwen.num_hidden_layers + 1
    assert all(getattr(p, "sequence_parallel") is (sizes.tp > 1) for p in norms)  # noqa: B009  not a field of its type
    AWAITED.clear()
    for module in model.modules():
        module.register_forward_pre_hook(note)
    tokens = torch.randint(0, qwen.vocab_size, (B, S))
    positions = torch.arange(S).expand(B, S)
    logits = model(tokens, positions, None)
    AWAITED.clear()
    losses = model(tokens, positions, None, labels=tokens, loss_mask=torch.ones(B, S))
    (logits.square().mean() + losses.mean()).backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


AWAITED: set[int] = set()  # places of weights whose module was called, or waited for as if


def note(module: torch.nn.Module, _: Any) -> None:
    """Acts as the hook by which Megatron-Core waits for a module's weights."""
    AWAITED.update(weight.data_ptr() for weight in module.parameters(recurse=False))


def is_there(*weights: torch.Tensor) -> None:
    """Weights are to be waited for before they are used, also where their module is not called."""
    assert all(weight.data_ptr() in AWAITED for weight in weights)


CALLS: Counter[str] = Counter()


def swiglu(gate_and_up: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    CALLS["swiglu"] += 1
    assert bias is None
    gate, up = gate_and_up.chunk(2, -1)
    return silu(gate) * up


class Norms:
    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        CALLS["norm"] += 1
        is_there(weight)
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    def norm_of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        CALLS["norm of a sum"] += 1
        CALLS["norm"] -= 1
        return x + residual, self.norm(x + residual, weight, eps)


def main() -> None:
    """Compares the model of the folder with itself, in a separate process."""
    prepare(CPU)
    patches.patch_training()
    from common.training.launching.process_group import process_group

    sizes = ParallelSizes(int(os.environ["WORLD_SIZE"]), tp=int(os.environ["WORLD_SIZE"]))
    with process_group(CPU, sizes, 1234, 5):
        compare(load_config(Path(sys.argv[1])), sizes)


def rotated(part: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    first, second = part.chunk(2, -1)
    return part * freqs.cos() + torch.cat([-second, first], -1) * freqs.sin()


def compare(qwen: QwenConfig, sizes: ParallelSizes) -> None:
    """A model's outputs with other code in these places, and without."""
    # Imported here: these import Megatron-Core, which must be prepared before.
    from common.model import build
    from common.model.kernels import selection as kernels
    from common.model.layers.gated_mlp import TorchProducts
    from common.model.layers.loss import LossInputs, LossParts, TorchKernels

    groups, heads = qwen.num_key_value_heads // sizes.tp, qwen.num_attention_heads // sizes.tp
    plain = outputs(qwen, sizes)

    def split_and_rotate(
        mixed: torch.Tensor, q_freqs: torch.Tensor, k_freqs: torch.Tensor, parts: list[int]
    ) -> tuple[torch.Tensor, ...]:
        CALLS["qkv"] += 1
        assert q_freqs is k_freqs and mixed.shape == (S, B, groups, sum(parts))
        assert q_freqs.shape == (S, 1, 1, qwen.head_dim) and q_freqs.dtype is torch.float32
        query, key, value = mixed.split(parts, -1)
        return rotated(query.reshape(S, B, heads, qwen.head_dim), q_freqs), rotated(key, q_freqs), value

    class Loss(TorchKernels):
        def losses(self, given: LossInputs, with_gradients: bool) -> LossParts:
            is_there(given.weight)
            return super().losses(given, with_gradients)

    class Products(TorchProducts):
        def up(self, x: torch.Tensor, weight: torch.Tensor, *out: torch.Tensor) -> None:  # type: ignore[override]
            CALLS["gate and up"] += 1
            is_there(weight)
            assert x.shape == (S * B, qwen.hidden_size)
            super().up(x, weight, *out)

        def down_gradient(self, *tensors: torch.Tensor) -> None:  # type: ignore[override]
            CALLS["down, backward"] += 1
            super().down_gradient(*tensors)

    config = build.TransformerConfig
    fused = {"bias_activation_fusion": True, **patches.single_qkv_rope(True)}
    setattr(build, "TransformerConfig", lambda **fields: config(**{**fields, **fused}))  # noqa: B010  not a type's name
    patches.use_kernels(swiglu, split_and_rotate)
    setattr(kernels, "loss_kernels", lambda *_: Loss())  # noqa: B010
    norms = Norms() if installed_engine().fused_residual_norms else None
    setattr(kernels, "fused_residual_norms", lambda *_: norms)  # noqa: B010
    layers = qwen.num_hidden_layers
    for recompute, products in product(("none", "full"), (None, Products())):
        setattr(kernels, "mlp_products", lambda *_, which=products: which)  # noqa: B010
        CALLS.clear()
        for mine, theirs in zip(outputs(qwen, sizes, recompute), plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
        passes = 2 if recompute == "full" else 1  # forward through the layers, for the logits and for the losses
        expected = {"swiglu": 2 * layers * passes}
        if products:
            expected = {"gate and up": 2 * layers * passes, "down, backward": 2 * layers}
        if installed_engine().fused_residual_norms:
            expected["qkv"] = 2 * layers * passes
            # Alone is normed what enters a stage, or a layer that is computed again by itself; and what leaves it then.
            expected["norm"] = 2 * (layers * passes + 1 if recompute == "full" else 1)
            expected["norm of a sum"] = 2 * (layers * passes if recompute == "full" else 2 * layers)
        assert expected == CALLS, (recompute, CALLS)


if __name__ == "__main__":
    main()
