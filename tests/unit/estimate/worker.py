"""One rank of any layout in one process: its real model, optimizer and schedule, without the other ranks.

    python -m tests.unit.estimate.worker '[{"folder": DIR, "world": 4, "rank": 1, "settings": {...}}]'

torch's "fake" process group answers every collective at once and moves nothing, so numbers mean nothing and sizes are
right. Prints for each task, as JSON, what is counted in the rank.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import log
from common.engine.installation import prepare
from common.engine.patches import add_numpy_dtypes
from common.estimate.memory import work_of
from common.model.shape import masks
from common.model.shape.config import load_config
from common.platforms.cpu import CPU
from common.training.planning.plan import Plan, Start
from common.training.settings import TrainSettings

add_numpy_dtypes()
from common.model.layers.gated_mlp import TorchProducts  # noqa: E402  imports Megatron-Core

MASK_ELEMENTS = masks.MASK_ELEMENTS
SCALAR_BYTES = 8  # left out: the loss's scale


class FusedNorm(torch.autograd.Function):
    """Saves what torch's fused RMSNorm saves on a GPU (aten::_fused_rms_norm): input, a float32 a row, weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        x, _, weight = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight), None


def fused_rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return FusedNorm.apply(x, weight, eps)


class FusedNormOfSum(torch.autograd.Function):
    """Saves what the kernel of common/model/kernels/norm_kernels.py saves: the sum, a float32 a row, weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        total = x + residual
        scale = torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(total, scale, weight)
        return total, (total.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        total, _, weight = ctx.saved_tensors
        return torch.zeros_like(total), torch.zeros_like(total), torch.zeros_like(weight), None


class InPlace(TorchProducts):
    """Writes gradients of both halves over them, as QuACK's."""

    @staticmethod
    def down_gradient(d_out: torch.Tensor, weight: torch.Tensor, both: torch.Tensor, activated: torch.Tensor) -> None:
        torch.mm(d_out, weight, out=activated)
        both.zero_()


class SplitAndRotate(torch.autograd.Function):
    """Saves what the kernel of common/model/kernels/qkv_rope.py saves: nothing of its input."""

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, parts: list[int]) -> tuple[torch.Tensor, ...]:
        query, key, value = mixed.split(parts, -1)
        query = query.reshape(*mixed.shape[:2], -1, parts[1])
        return query.contiguous(), key.contiguous(), value.contiguous()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        s, b, groups, _ = upstream[1].shape
        return torch.cat([gradient.reshape(s, b, groups, -1) for gradient in upstream], -1), None


class SavedTensor:
    """A tensor that autograd saves, counted as long as it is saved."""

    def __init__(self, ledger: "Ledger", tensor: torch.Tensor) -> None:
        # Detached: with its history an operation's output would hold the operation, which holds it.
        self.ledger, self.tensor = ledger, tensor.detach()
        ledger.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.ledger.add(self.tensor.untyped_storage(), -1)


class Ledger:
    """Bytes of the storages that autograd saves, each once, without the parameters'."""

    def __init__(self, model: list[Any]) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for chunk in model for p in chunk.parameters()}
        self.users: dict[int, int] = {}
        self.now = self.most = 0

    def add(self, storage: Any, number: int) -> None:
        place = storage.data_ptr()
        before = self.users.get(place, 0)
        self.users[place] = before + number
        if (before == 0) != (before + number == 0) and storage.nbytes() > SCALAR_BYTES:
            self.now += number * storage.nbytes()
            self.most = max(self.most, self.now)

    def pack(self, tensor: torch.Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in self.parameters else SavedTensor(self, tensor)

    def unpack(self, kept: Any) -> torch.Tensor:
        return kept.tensor if isinstance(kept, SavedTensor) else kept


class Live(TorchDispatchMode):
    """The peak bytes of tensors that were made under it, storages counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Products in bf16 are slow on many CPUs, and numbers mean nothing.
        product = func is torch.ops.aten.mm.default
        made = args[0].new_zeros(len(args[0]), args[1].shape[1]) if product else func(*args, **(kwargs or {}))
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        storages = [x.untyped_storage() for x in tree_leaves(made) if torch.is_tensor(x)]
        new = {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        new = {reference: size for reference, size in new.items() if reference not in given}
        if new:  # there are more bytes only then
            kept = {reference: size for reference, size in self.sizes.items() if not reference.expired()}
            self.sizes = {**kept, **new}
            self.most = max(self.most, sum(self.sizes.values()))
        return made


def plan_of(task: dict[str, Any]) -> Plan:
    train_settings = TrainSettings(
        save_checkpoint_path="-", dataset_path="-", train_iters=1, gpus=task["world"], **task["settings"]
    )
    folder = Path(task["folder"])
    platform = replace(CPU, fused_kernels=task.get("fused", False))
    return Plan(
        settings=train_settings, platform=platform, sizes=train_settings.sizes, qwen=load_config(folder),
        start=Start("random", folder, None), transformer_impl="local", ckpt_format="torch_dist",
        train=None, valid=None, train_iters=1,
    )  # fmt: skip


def batch_of(plan: Plan) -> dict[str, torch.Tensor]:
    size = plan.settings.micro_batch_size, plan.settings.seq_length
    batch = {"tokens": torch.zeros(size, dtype=torch.long), "labels": torch.zeros(size, dtype=torch.long)}
    batch["loss_mask"] = torch.ones(size)
    if plan.settings.packing or plan.settings.reset_attention:
        # With CP each chunk is a document: those that begin in another take masks on a CPU, and none on a GPU.
        chunk = size[1] // (2 * plan.sizes.cp if plan.sizes.cp > 1 else 1)
        batch["segment_ids"] = torch.arange(size[1]).expand(size) // chunk
    return batch


def peak(plan: Plan) -> dict[str, Any]:
    """The peak bytes of a step, the optimizer's included."""
    from common.training.checkpointing.optimizer_state import initialize_optimizer_state
    from common.training.loop.train_step import train_step
    from common.training.state.training_state import build_training_state

    training_state = build_training_state(plan)
    initialize_optimizer_state(training_state)
    data = [iter([batch_of(plan) for _ in range(plan.num_microbatches)]) for _ in training_state.model]
    with Live() as live:
        train_step(plan, training_state, data, 0, False)
    return {"peak": live.most}


def count(plan: Plan, activations: bool) -> dict[str, Any]:
    """Parameters, bytes of the state, and the peak of what autograd saved during a step."""
    from common.model.build import unwrap
    from common.training.checkpointing.optimizer_state import initialize_optimizer_state
    from common.training.loop.forward_step import forward_backward
    from common.training.state.optimizer import distributed_optimizers
    from common.training.state.training_state import build_training_state

    training_state = build_training_state(plan)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for chunk in training_state.model for p in unwrap(chunk).parameters()),
        "weights": sum(p.nbytes for chunk in training_state.model for p in unwrap(chunk).parameters()),
        "gradients": sum(p.main_grad.nbytes for chunk in training_state.model for p in unwrap(chunk).parameters()),
    }
    if activations:
        ledger = Ledger(training_state.model)
        data = [iter([batch_of(plan) for _ in range(plan.num_microbatches)]) for _ in training_state.model]
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, ledger.unpack):
            forward_backward(plan, training_state, data, forward_only=False)
        assert ledger.now == 0, "the step is over, and autograd still keeps something"
        result["kept"] = ledger.most
    else:
        initialize_optimizer_state(training_state)
        seen: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for chunk in training_state.model for p in unwrap(chunk).parameters()}
        for part in distributed_optimizers(training_state.optimizer):
            main = [p for group in part.optimizer.param_groups for p in group["params"]]
            state = [x for each in part.optimizer.state.values() for x in each.values() if torch.is_tensor(x)]
            for tensor in (*main, *(x for x in state if x.numel() > 1)):
                if tensor.untyped_storage().data_ptr() not in own:
                    seen[id(tensor)] = tensor.nbytes
        result["optimizer"] = sum(seen.values())
    return result


def main() -> None:
    log.quiet_libraries()
    prepare(CPU)
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    from common.model.kernels import selection as kernels
    from common.model.layers.loss import TorchKernels
    from common.training.launching.process_group import seed_everything
    from tests.distributed.gloo_exchange import GlooExchange

    composite = getattr(torch.nn.functional, "rms_norm", None)  # from torch 2.4 on
    kernels.loss_kernels = lambda *_: TorchKernels()
    sys.modules["common.model.kernels.swiglu"] = SimpleNamespace(bias_swiglu=bias_swiglu_impl)  # type: ignore[assignment]
    sys.modules["common.model.kernels.qkv_rope"] = SimpleNamespace(  # type: ignore[assignment]
        split_and_rotate=lambda mixed, _, __, parts: SplitAndRotate.apply(mixed, parts)
    )
    norms = SimpleNamespace(norm=FusedNorm.apply, norm_of_sum=FusedNormOfSum.apply)
    sys.modules["common.model.kernels.norm_kernels"] = SimpleNamespace(TritonNorms=lambda: norms)  # type: ignore[assignment]
    kernels.fuse_rotary_embedding = lambda: None  # torch.compile, for which a CPU needs a C++ compiler
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})
    for task in json.loads(sys.argv[1]):
        fused = task["settings"].get("fused_products") == "true"
        kernels.mlp_products = lambda *_, fused=fused: InPlace() if fused else None
        if composite:
            torch.nn.functional.rms_norm = fused_rms_norm if task.get("fused") else composite
        masks.MASK_ELEMENTS = 0 if task.get("long") else MASK_ELEMENTS
        plan = plan_of(task)
        exchanging = work_of(plan.settings, plan.platform, plan.qwen).exchanging
        kernels.tp_exchange = lambda *_, exchanging=exchanging: GlooExchange() if exchanging else None
        sizes = plan.sizes
        dist.init_process_group("fake", rank=task["rank"], world_size=sizes.world_size, store=FakeStore())
        parallel_state.initialize_model_parallel(
            sizes.tp, sizes.pp, virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
            context_parallel_size=sizes.cp,
        )  # fmt: skip
        seed_everything(1)
        found = peak(plan) if task.get("peak") else count(plan, task.get("activations", False))
        print(json.dumps(found))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
