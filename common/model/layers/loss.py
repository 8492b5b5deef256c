"""The fused output layer and cross-entropy: the logits exist only for one chunk of tokens at a time.

Letters: n tokens of a micro-batch, c of a chunk, h hidden_size, v this rank's rows of the vocabulary.

For each chunk the forward pass computes the logits [c, v], the loss, and in place the gradient of the logits, from
which it computes those of the hidden states and the weight, as Liger Kernel does (arXiv 2410.10989, section 3). Each
token's gradient is scaled by its loss weight, so the upstream gradient must be the same for all tokens, as for a sum.
With tensor parallelism the softmax is computed from each rank's largest logit and sum (arXiv 1909.08053, section 3).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.model.layers.gradients import accumulate_main_grad, matmul_into
from common.model.shape.chunks import chunk_size


class Vocabulary(NamedTuple):
    """This tensor-parallel rank's rows of the output layer; `num_tokens` of them are not padding."""

    group: Any
    first: int
    num_tokens: int

    @property
    def num_ranks(self) -> int:
        """The number of ranks that the vocabulary is split over."""
        return 1 if self.group is None else dist.get_world_size(self.group)


class LossInputs(NamedTuple):
    """The inputs of LinearCrossEntropy; local: labels as indices of this rank's rows, -1 for other ranks' labels."""

    hidden: torch.Tensor
    weight: torch.Tensor
    local: torch.Tensor
    weights: torch.Tensor
    vocabulary: Vocabulary


# The losses, and the gradients of hidden and weight, if requested.
LossParts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class LinearCrossEntropy(torch.autograd.Function):
    """hidden [n, h], weight [v, h], labels int64 [n], weights float32 [n] -> float32 [n]: each token's weighted loss.

    If the weight has a `main_grad`, its gradient is added there, and autograd gets an unused tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        vocabulary: Vocabulary,
        kernels: Any,
        with_gradients: bool,
    ) -> torch.Tensor:
        """The losses; `with_gradients` also saves the gradients of hidden and weight for the backward pass."""
        inputs = LossInputs(hidden, weight, local_labels(labels, vocabulary), weights, vocabulary)
        losses, *ctx.gradients = kernels.losses(inputs, with_gradients)
        ctx.save_for_backward(weight)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The saved gradients times the upstream gradient, which is the same for all tokens."""
        (weight,) = ctx.saved_tensors
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        scale = upstream[0].reshape(-1)[0]
        gradient = None
        if d_weight is not None:
            gradient = accumulate_main_grad(weight, lambda total: total.addcmul_(d_weight, scale))
        return d_hidden.mul_(scale.to(d_hidden.dtype)), gradient, None, None, None, None, None


class RecomputedCrossEntropy(torch.autograd.Function):
    """As LinearCrossEntropy, for any upstream gradient: the backward pass computes the logits once more.

    What a loss over sums of log-probabilities needs, whose gradient differs between tokens and is known only after the
    forward pass. A token's gradient is that of LinearCrossEntropy at its weight times its upstream gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        vocabulary: Vocabulary,
        kernels: Any,
        with_gradients: bool,
    ) -> torch.Tensor:
        """The losses; `with_gradients` also saves the inputs for the backward pass."""
        inputs = LossInputs(hidden, weight, local_labels(labels, vocabulary), weights, vocabulary)
        if with_gradients:
            ctx.save_for_backward(*inputs[:4])
            ctx.vocabulary, ctx.kernels = vocabulary, kernels
        losses: torch.Tensor = kernels.losses(inputs, False)[0]
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of hidden and weight, by the same kernels at weights times the tokens' upstream gradients."""
        hidden, weight, local, weights = ctx.saved_tensors
        inputs = LossInputs(hidden, weight, local, weights * upstream[0], ctx.vocabulary)
        _, d_hidden, d_weight = ctx.kernels.losses(inputs, True)
        gradient = None
        if d_weight is not None:
            gradient = accumulate_main_grad(weight, lambda total: total.add_(d_weight))
        return d_hidden, gradient, None, None, None, None, None


def local_labels(labels: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """`labels` as indices of this rank's rows, -1 for those of other ranks."""
    local = labels - vocabulary.first
    return torch.where((local >= 0) & (local < vocabulary.num_tokens), local, -1)


def reduce_over_ranks(
    largest: torch.Tensor, total: torch.Tensor, target: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest logit, sum of exp(logit - largest), label's logit), float32 [c] each, over the full vocabulary."""
    if vocabulary.num_ranks == 1:
        return largest, total, target
    global_max = largest.clone()
    dist.all_reduce(global_max, dist.ReduceOp.MAX, vocabulary.group)
    sums = torch.stack([total * (largest - global_max).exp(), target])
    dist.all_reduce(sums, dist.ReduceOp.SUM, vocabulary.group)
    return global_max, sums[0], sums[1]


class TorchKernels:
    """The losses chunk by chunk, with both steps on a chunk's logits in plain PyTorch."""

    def losses(self, inputs: LossInputs, with_gradients: bool) -> LossParts:
        """The losses float32 [n], and the gradients of hidden, in its dtype, and of weight, in float32, if trained."""
        hidden, weight, local, weights, vocabulary = inputs
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if with_gradients else None
        needs_weight = with_gradients and weight.requires_grad
        d_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
        size = chunk_size(len(hidden), weight.shape[0] * weight.element_size())
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = hidden[part] @ weight.t()
            logits[:, vocabulary.num_tokens :] = float("-inf")  # rows that pad the vocabulary
            largest, total, target = self.statistics(logits, local[part])
            largest, total, target = reduce_over_ranks(largest, total, target, vocabulary)
            losses[part] = (total.log() + largest - target) * weights[part]
            if d_hidden is None:
                continue
            gradient = self.gradients(logits, local[part], largest, total, weights[part])
            torch.mm(gradient, weight, out=d_hidden[part])
            if d_weight is not None:
                matmul_into(d_weight, gradient, hidden[part], add=start > 0)
        return losses, d_hidden, d_weight

    @staticmethod
    def statistics(logits: torch.Tensor, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(largest logit, sum of exp(logit - largest), the label's logit or 0 if it is another rank's) of [c, v]."""
        wide = logits.float()
        largest = wide.max(dim=1).values
        total = (wide - largest[:, None]).exp_().sum(dim=1)
        target = wide.gather(1, local.clamp(min=0)[:, None])[:, 0]
        return largest, total, torch.where(local >= 0, target, 0.0)

    @staticmethod
    def gradients(
        logits: torch.Tensor, local: torch.Tensor, largest: torch.Tensor, total: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """weight x (softmax - one-hot label) of [c, v], in the dtype of the logits."""
        wide = (logits.float() - largest[:, None]).exp_().mul_((weights / total)[:, None])
        mine = (local >= 0).nonzero()[:, 0]
        wide[mine, local[mine]] -= weights[mine]
        return wide.to(logits.dtype)
