"""The output layer and its cross-entropy in one: the logits exist a chunk of tokens at a time.

Letters: n tokens of a micro-batch, c of a chunk, h hidden_size, v this rank's rows of the vocabulary.

Of each chunk the logits [c, v] are made, turned into the loss and, in place, into their own gradient, and multiplied
with the weight and the hidden states; then they are gone. The gradient of a token is that of its loss times its weight,
so what comes from above must be the same for all tokens, as under a sum. Over tensor-parallel ranks the softmax is put
together from each rank's largest logit and sum (arXiv 1909.08053, section 3). The chunk-wise gradient in the forward
pass is that of Liger Kernel (arXiv 2410.10989, section 3).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.model.layers.gradients import give_gradient, put_product
from common.model.shape.chunks import chunk_size


class Vocabulary(NamedTuple):
    """This tensor-parallel rank's rows of the output layer, and how many of them are tokens and not padding."""

    group: Any
    first: int
    num_tokens: int

    @property
    def num_ranks(self) -> int:
        """Over which the vocabulary is divided."""
        return 1 if self.group is None else dist.get_world_size(self.group)


class LossInputs(NamedTuple):
    """What LinearCrossEntropy is given; local: labels as numbers of this rank's rows, -1 where not among them."""

    hidden: torch.Tensor
    weight: torch.Tensor
    local: torch.Tensor
    weights: torch.Tensor
    vocabulary: Vocabulary


# The losses, and the gradients of hidden and weight where they are wanted.
LossParts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class LinearCrossEntropy(torch.autograd.Function):
    """hidden [n, h], weight [v, h], labels int64 [n], weights float32 [n] -> float32 [n]: each token's weighted loss.

    Where the weight has a `main_grad`, its gradient is added there, and what autograd gets for it is empty.
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
        """The losses; with gradients, those of hidden and weight are kept for the backward pass."""
        local = labels - vocabulary.first
        local = torch.where((local >= 0) & (local < vocabulary.num_tokens), local, -1)
        given = LossInputs(hidden, weight, local, weights, vocabulary)
        losses, *ctx.gradients = kernels.losses(given, with_gradients)
        ctx.save_for_backward(weight)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The kept gradients times the one factor from above."""
        (weight,) = ctx.saved_tensors
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        scale = upstream[0].reshape(-1)[0]
        gradient = give_gradient(weight, lambda total: total.addcmul_(d_weight, scale))
        return d_hidden.mul_(scale.to(d_hidden.dtype)), gradient, None, None, None, None, None


def reduce_over_ranks(
    largest: torch.Tensor, total: torch.Tensor, target: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest logit, sum of exp(logit - largest), label's logit), float32 [c] each, over the whole vocabulary."""
    if vocabulary.num_ranks == 1:
        return largest, total, target
    everywhere = largest.clone()
    dist.all_reduce(everywhere, dist.ReduceOp.MAX, vocabulary.group)
    both = torch.stack([total * (largest - everywhere).exp(), target])
    dist.all_reduce(both, dist.ReduceOp.SUM, vocabulary.group)
    return everywhere, both[0], both[1]


class TorchKernels:
    """The losses in chunks, and the two steps on a chunk's logits by plain PyTorch."""

    def losses(self, given: LossInputs, with_gradients: bool) -> LossParts:
        """float32 [n], and the gradients in the dtype of hidden and in float32, with a chunk's logits at a time."""
        hidden, weight, local, weights, vocabulary = given
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if with_gradients else None
        d_weight = torch.empty_like(weight, dtype=torch.float32) if with_gradients else None
        size = chunk_size(len(hidden), weight.shape[0] * weight.element_size())
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = hidden[part] @ weight.t()
            logits[:, vocabulary.num_tokens :] = float("-inf")  # rows that pad the vocabulary
            largest, total, target = self.statistics(logits, local[part])
            largest, total, target = reduce_over_ranks(largest, total, target, vocabulary)
            losses[part] = (total.log() + largest - target) * weights[part]
            if d_hidden is not None and d_weight is not None:
                gradient = self.gradients(logits, local[part], largest, total, weights[part])
                torch.mm(gradient, weight, out=d_hidden[part])
                put_product(d_weight, gradient, hidden[part], add=start > 0)
        return losses, d_hidden, d_weight

    @staticmethod
    def statistics(logits: torch.Tensor, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(largest logit, sum of exp(logit - largest), the label's logit or 0 where it is another rank's) of [c, v]."""
        wide = logits.float()
        largest = wide.max(dim=1).values
        total = (wide - largest[:, None]).exp_().sum(dim=1)
        target = wide.gather(1, local.clamp(min=0)[:, None])[:, 0]
        return largest, total, torch.where(local >= 0, target, 0.0)

    @staticmethod
    def gradients(
        logits: torch.Tensor, local: torch.Tensor, largest: torch.Tensor, total: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """weight x (softmax - one at the label) of [c, v], in the dtype of the logits."""
        wide = (logits.float() - largest[:, None]).exp_().mul_((weights / total)[:, None])
        mine = (local >= 0).nonzero()[:, 0]
        wide[mine, local[mine]] -= weights[mine]
        return wide.to(logits.dtype)
