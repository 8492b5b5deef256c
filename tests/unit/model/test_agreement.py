"""A kernel that fails on one of two ranks, in any way, is skipped by both: they train with the same ones."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine.versions import installed_engine
from common.errors import KitError
from common.model.shape.config import QwenConfig, load_config
from common.model.shape.options import ModelOptions
from common.parallel import ParallelSizes
from common.platforms import PLATFORMS
from tests.distributed.launch import forked
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[3]
S, B, STEPS = 32, 2, 4
MESSAGE = "TypeError: __init__() got an unexpected keyword argument"


class Broken:
    """Makes the import of one module fail."""

    def __init__(self, module: str, error: BaseException) -> None:
        self.module, self.error = module, error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.module:
            raise self.error


ERRORS: dict[str, BaseException] = {
    "TypeError": TypeError("__init__() got an unexpected keyword argument\nand more"),
    "SystemExit": SystemExit(1),
    "ImportError": ImportError("libcute.so: cannot open shared object file"),
}
SYMMETRIC = "torch.distributed._symmetric_memory"  # from torch 2.5 on
WITHOUT_GPU = f"no module {SYMMETRIC}"
if find_spec(SYMMETRIC):  # by torch's build
    number = "TypeError: device(): argument 'index' (position 2) must be int, not torch.device"
    WITHOUT_GPU = number if torch.version.cuda else "no module cuda"
FUSED_NORMS = installed_engine().fused_residual_norms
BOTH = {
    "core_attention": "SdpaAttention",
    "products": "QuackProducts",
    "norms": "TritonNorms" if FUSED_NORMS else "NoneType",
    "loss": "QuackLoss",
    "exchange": "NoneType",
}
SWIGLU, LOSS = "SwiGLU: fused into matrix products (QuACK)", "loss: fused into matrix products (QuACK)"
# What fails on rank 1 alone: the module and how, settings, the kernels of both ranks, and a line of both.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, str], str]] = {
    "nothing": ("", "", {}, BOTH, LOSS),
    "quack": (
        "quack", "TypeError", {}, {**BOTH, "products": "NoneType", "loss": "TritonKernels"},
        f"SwiGLU: not fused into matrix products (QuACK: {MESSAGE} (rank 1 of 2))",
    ),
    "quack ends the process": (
        "quack", "SystemExit", {}, {**BOTH, "products": "NoneType", "loss": "TritonKernels"},
        "loss: not fused into matrix products (QuACK: SystemExit: 1 (rank 1 of 2))",
    ),
    "the loss of the last stage": (
        "quack.linear_cross_entropy", "TypeError", {"pp": 2}, {**BOTH, "loss": "TritonKernels"},
        f"loss: not fused into matrix products (QuACK: {MESSAGE} (rank 1 of 2))",
    ),
    "triton": (
        "common.model.kernels.qkv_rope", "ImportError", {},
        {**BOTH, "products": "NoneType", "norms": "NoneType", "loss": "TorchKernels"},
        "Triton kernels: not used, PyTorch's and Megatron-Core's are slower (ImportError: libcute.so: cannot"
        " open shared object file (rank 1 of 2))",
    ),
    "triton's norms": (
        "common.model.kernels.norm_kernels", "TypeError", {}, {**BOTH, "norms": "NoneType"},
        f"norms: not fused with the residual adds (Triton: {MESSAGE} (rank 1 of 2))",
    ),
    "triton's loss": (
        "common.model.kernels.loss_kernels", "TypeError", {}, {**BOTH, "loss": "TorchKernels"},
        f"loss: PyTorch (Triton: {MESSAGE} (rank 1 of 2))",
    ),
    "copies between the GPUs": (
        SYMMETRIC, "TypeError", {"tp": 2}, {**BOTH, "loss": "TritonKernels"},
        f"TP communication: not overlapped with matrix products ({WITHOUT_GPU} (rank 0 of 2); {MESSAGE} (rank 1 of 2))",
    ),
    "flash_attn": (
        "flash_attn", "TypeError", {"attention": ["flash_attn", "sdpa"]}, BOTH,
        f"core attention: sdpa (flash_attn: {MESSAGE} (rank 1 of 2))",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"), std=0.05, tie_word_embeddings=False, num_hidden_layers=2)


def two_ranks(qwen: Path, **task: Any) -> list[dict[str, Any]]:
    """The output of both, rank 0 first."""
    stubs = [ROOT / "tests" / "stubs" / name for name in ("quack", "flash_attn")]
    path = ":".join(map(str, [ROOT, *stubs]))
    printed = forked(
        2, __name__, [json.dumps({"qwen": str(qwen), **task})], more={"PYTHONPATH": path, "LOCAL_WORLD_SIZE": "2"}
    )
    results = [json.loads(line) for line in printed.splitlines() if line.startswith('{"rank": ')]
    return sorted(results, key=lambda each: each.pop("rank"))


@pytest.mark.parametrize("case", [case for case in CASES if FUSED_NORMS or case != "triton's norms"])
def test_a_kernel_that_fails_on_one_rank_is_skipped_by_both_and_they_train(case: str, qwen: Path) -> None:
    module, error, settings, kernels, line = CASES[case]
    first, second = two_ranks(qwen, module=module, error=error, **settings)
    assert first["kernels"] == second["kernels"] == kernels
    assert first["log"] == second["log"] and line in first["log"]
    losses = first["losses"] or second["losses"]
    assert len(losses) == STEPS and losses == sorted(losses, reverse=True), losses


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"module": "quack", "fused_products": "true"},
            f"FUSED_PRODUCTS=true, but QuACK cannot fuse SwiGLU into matrix products here: {MESSAGE}",
        ),
        (
            {"module": "common.model.kernels.swiglu", "fused_products": "true"},
            f"FUSED_PRODUCTS=true, but QuACK cannot fuse SwiGLU and loss into matrix products here: Triton: {MESSAGE}",
        ),
        (
            {"module": "flash_attn", "core_attention": "flash_attn"},
            f"no core attention works here (flash_attn: {MESSAGE} (rank 1 of 2))",
        ),
    ],
    ids=["products", "triton", "attention"],
)
def test_a_requested_kernel_that_fails_on_one_rank_ends_both(task: dict[str, str], message: str, qwen: Path) -> None:
    first, second = two_ranks(qwen, error="TypeError", **task)
    assert first == second and first["error"].startswith(message)


def main() -> None:
    """Builds and trains a model in a rank, one module of which fails on rank 1."""
    task = json.loads(sys.argv[1])
    from common.model.kernels import selection as kernels
    from common.training.launching.process_group import process_group
    from tests.unit.model import plain_kernels

    plain_kernels.install()
    setattr(kernels, "_need_hopper", lambda _: None)  # noqa: B010  QuACK's stub is for CPUs
    setattr(kernels, "fuse_rotary_embedding", lambda: None)  # noqa: B010  needs a compiler
    if task.get("module") and os.environ["RANK"] == "1":
        sys.modules.pop(task["module"], None)
        sys.meta_path.insert(0, Broken(task["module"], ERRORS[task["error"]]))  # type: ignore[arg-type]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kit").addHandler(handler)
    logging.getLogger("kit").setLevel(logging.INFO)
    sizes = ParallelSizes(2, tp=task.get("tp", 1), pp=task.get("pp", 1))
    with process_group(PLATFORMS["cpu"], sizes, 1234, 1):
        result = found(load_config(Path(task["qwen"])), sizes, task)
        line = json.dumps({"rank": int(os.environ["RANK"]), **result, "log": lines})
        os.write(1, f"{line}\n".encode())  # in one piece: both ranks write to one file


def found(qwen: QwenConfig, sizes: ParallelSizes, task: dict[str, Any]) -> dict[str, Any]:
    """The kernels of the rank and the losses of its steps, or the error."""
    from common.model import build

    options = ModelOptions(
        "bf16", "local", "none", fused_products=task.get("fused_products", "auto"),
        core_attention=task.get("core_attention", "auto"),
    )  # fmt: skip
    platform = replace(PLATFORMS["cpu"], fused_kernels=True, core_attention=tuple(task.get("attention", ["sdpa"])))
    kept: list[Any] = []
    choose = build.select_kernels
    setattr(build, "select_kernels", lambda *given: kept.append(choose(*given)) or kept[0])  # noqa: B010
    try:
        (model,) = build.build_model(qwen, sizes, options, platform, S)
    except KitError as error:
        return {"error": str(error)}
    names = {name: type(part).__name__ for name, part in vars(kept[0]).items()}
    return {"kernels": {**names, "core_attention": kept[0].core_attention.__name__}, "losses": list(train(model, qwen))}


def train(model: torch.nn.Module, qwen: QwenConfig) -> Iterator[float]:
    """The loss before each step of SGD, on the last stage; replicas add up their gradients."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = torch.randint(0, qwen.vocab_size, (B, S), generator=torch.Generator().manual_seed(1))

    def forward_step(data: Iterator[torch.Tensor], model: Any) -> Any:
        given, ones = next(data), torch.ones(B, S)
        output = model(given, torch.arange(S).expand(B, S), None, labels=given, loss_mask=ones)
        return output, lambda losses: (losses.sum(), ones.sum().int(), losses.detach().mean().clone())

    for _ in range(STEPS):
        model.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter([tokens] * 2), model=[model], num_microbatches=2,
            seq_length=S, micro_batch_size=B, decoder_seq_length=S, forward_only=False,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                gradient = parameter.grad.float()  # type: ignore[union-attr]
                torch.distributed.all_reduce(gradient, group=parallel_state.get_data_parallel_group())
                parameter -= (1e-3 * gradient).to(parameter.dtype)
        if reports:
            yield float(reports[0])


if __name__ == "__main__":
    main()
