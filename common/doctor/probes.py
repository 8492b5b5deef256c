"""Imports and small operations that may crash, run in a subprocess.

    python -m common.doctor.probes NAME ...     prints a JSON line for each: {"probe", "works", "result"}

The names are those of the functions below; each returns its result, or raises.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from common.engine.installation import prepare
from common.engine.patches import add_numpy_dtypes
from common.platforms import current
from common.start import from_kit

TIMEOUT_S = 300


def devices() -> dict[str, Any]:
    """torch's version, the CUDA version it was built for, and [name, free bytes, total bytes] of each device."""
    import torch

    found = []
    if current().device == "cuda":
        for index in range(torch.cuda.device_count()):
            found.append([torch.cuda.get_device_name(index), *torch.cuda.mem_get_info(index)])
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": found}


def matmul() -> str:
    """A bf16 matrix product, compared with float32."""
    import torch

    x = torch.arange(64 * 64).reshape(64, 64) % 7 - 3
    product = x.to(_device(), torch.bfloat16) @ x.T.to(_device(), torch.bfloat16)
    assert torch.equal(product.float().cpu(), (x.float() @ x.T.float()).bfloat16().float()), "the product is wrong"
    return "bf16 matrix product"


def attention() -> str:
    """PyTorch's attention with grouped heads, forward and backward."""
    return _attention("sdpa")


def masked_attention() -> str:
    """Attention with a block-causal mask, as for packed sequences: no sample attends to another."""
    import torch

    from common.model.layers.documents import separation

    segments = torch.tensor([[0] * 24 + [1] * 40])
    query = torch.randn(64, 1, 4, 64, device=_device()).bfloat16()
    changed = query.clone()
    changed[:24] += 1
    mask = separation(segments, _device())
    before, after = (_sdpa(x, mask) for x in (query, changed))
    assert torch.equal(before[24:], after[24:]), "a sample attends to another one of its row"
    assert not torch.equal(before[:24], after[:24]), "the output does not depend on the input"
    return "attention with a mask"


def collective() -> str:
    """An all-reduce over the platform's backend, in a group of one process."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(current().backend, store=dist.HashStore(), rank=0, world_size=1)
    tensor = torch.ones(4, device=_device())
    dist.all_reduce(tensor)
    assert tensor.sum().item() == 4, "the sum is wrong"
    dist.destroy_process_group()
    return f"all-reduce over {current().backend}"


def transformer_engine() -> str:
    """transformer_engine.pytorch, whose failure `import transformer_engine` hides; with a device its Linear."""
    import torch
    import transformer_engine.pytorch as te

    if torch.cuda.is_available():
        layer = te.Linear(64, 64, bias=False, params_dtype=torch.bfloat16, device="cuda")
        x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
        out = layer(x)
        out.sum().backward()
        assert torch.allclose(out.float(), (x @ layer.weight.T).float(), atol=0.05, rtol=0.02), "its Linear is wrong"
    return "imports" if not torch.cuda.is_available() else "Linear, forward and backward"


def apex() -> str:
    """apex's fused Adam, with a device one step of it against torch's; its fused weight gradient."""
    import torch
    from apex.optimizers import FusedAdam, FusedSGD  # noqa: F401  Megatron-Core imports both or uses neither

    results = ["fused Adam imports"]
    if torch.cuda.is_available():
        mine, theirs = (torch.nn.Parameter(torch.ones(64, device="cuda")) for _ in range(2))
        for parameter, kind in ((mine, FusedAdam), (theirs, torch.optim.AdamW)):
            parameter.grad = torch.linspace(-1, 1, 64, device="cuda")
            kind([parameter], lr=0.1, weight_decay=0.01).step()
        assert torch.allclose(mine, theirs, atol=1e-5), "its fused Adam is not Adam"
        results = ["a step of its fused Adam"]
    if find_spec("fused_weight_gradient_mlp_cuda") is None:
        results.append("no kernel for weight gradients")
    return ", ".join(results)


def flash_attn() -> str:
    """flash_attn with grouped heads, forward and backward; without a device only its import."""
    import torch
    from flash_attn import flash_attn_func  # noqa: F401

    return _attention("flash_attn") if torch.cuda.is_available() else "imports"


def flash_attn_4() -> str:
    """As `flash_attn`, for FlashAttention 4."""
    import torch
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # noqa: F401

    return _attention("flash_attn_4") if torch.cuda.is_available() else "imports"


def quack_kernels() -> str:
    """QuACK's GEMMs with fused SwiGLU and loss; without a device only their import."""
    import torch

    from common.model.kernels import quack_loss
    from common.model.kernels.quack_products import QuackProducts
    from common.model.layers import gated_mlp

    products, loss = QuackProducts(), quack_loss.QuackLoss()
    if not torch.cuda.is_available():
        return "imports"
    failures = [
        gated_mlp.unusable_reason(products, 256, 512, _device()),
        quack_loss.unusable_reason(loss, 256, 151936, _device()),
    ]
    assert not any(failures), "; ".join(filter(None, failures))
    return "SwiGLU and the loss fused into matrix products, forward and backward"


def megatron() -> str:
    """Megatron-Core's model, optimizer and checkpoints, as training imports them."""
    prepare(current())
    import common.training.loop.run  # noqa: F401

    return "imports, as training does"


PROBES: dict[str, Callable[[], Any]] = {
    probe.__name__: probe
    for probe in (
        devices, matmul, attention, masked_attention, collective, transformer_engine, apex, flash_attn, flash_attn_4,
        quack_kernels, megatron,
    )
}  # fmt: skip


def _attention(kind: str) -> str:
    from common.model.layers.attention import KINDS, unusable_reason

    failure = unusable_reason(KINDS[kind], (8, 2, 64), _device())
    assert not failure, failure
    return f"attention by {kind}, 8 heads in 2 groups, forward and backward"


def _sdpa(query: Any, mask: Any) -> Any:
    from types import SimpleNamespace

    from common.model.layers.attention import SdpaAttention

    config = SimpleNamespace(softmax_scale=None, context_parallel_size=1)
    return SdpaAttention(config, 1, None, "self")(query, query, query, mask)


def _device() -> Any:
    import torch

    return torch.device(current().device)


def run(names: list[str]) -> dict[str, tuple[bool, Any]]:
    """(whether it works, its result or error) of each probe; they run in order in one subprocess."""
    command = [sys.executable, "-m", "common.doctor.probes", *names]
    try:
        with from_kit():
            env = {**os.environ, "PYTHONWARNINGS": "ignore"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, check=False)
        ended = f"its process ended with {done.returncode}" + (f": {_last_line(done.stderr)}" if done.stderr else "")
        printed = done.stdout
    except subprocess.TimeoutExpired as error:
        ended = f"it hung for {TIMEOUT_S} s"
        printed = (error.stdout or b"").decode()
    results: dict[str, tuple[bool, Any]] = {}
    for line in printed.splitlines():
        if line.startswith('{"probe": '):
            each = json.loads(line)
            results[each["probe"]] = (each["works"], each["result"])
    for name in names:
        if name not in results:
            results[name] = (False, ended)
            ended = "not run: the previous probe ended the process"
    return results


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no message"


def main() -> None:
    """Runs the probes named on the command line."""
    add_numpy_dtypes()  # attention imports Megatron-Core too, and not the rest of what `prepare` does
    for name in sys.argv[1:]:
        try:
            result = {"probe": name, "works": True, "result": PROBES[name]()}
        except Exception as error:  # whatever a broken build raises: AttributeError, OSError, RuntimeError
            result = {"probe": name, "works": False, "result": f"{type(error).__name__}: {_last_line(str(error))}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
