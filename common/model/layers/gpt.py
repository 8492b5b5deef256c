"""Megatron-Core's GPTModel with a fused output layer and loss: the logits never exist all at once."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from common.engine.versions import installed_engine
from common.model.layers.loss import LinearCrossEntropy, RecomputedCrossEntropy, Vocabulary
from common.model.layers.tp_mappings import enter
from common.model.layers.weights import await_weights


class QwenModel(GPTModel):
    """GPTModel with the output layer and its loss fused, if labels are given.

    num_tokens: size of the vocabulary without padding.
    loss_kernels: the kernels of LinearCrossEntropy.
    per_token_gradients: the upstream gradient of the losses differs between tokens; costs one more product of the
    output layer.
    """

    def __init__(
        self, *args: Any, num_tokens: int, loss_kernels: Any, per_token_gradients: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._num_tokens = num_tokens
        self._kernels = loss_kernels
        self._cross_entropy = RecomputedCrossEntropy if per_token_gradients else LinearCrossEntropy

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The hidden states on a stage that is not the last; otherwise logits [b, s, v], or with labels losses [b, s].

        The losses are float32, multiplied by loss_mask [b, s]. Their upstream gradient must be uniform, as of a sum,
        unless the model was built with `per_token_gradients`.
        """
        if labels is None or not self.post_process:
            return super().forward(input_ids, position_ids, attention_mask, **kwargs)
        assert loss_mask is not None
        engine = installed_engine()
        if engine.separate_postprocess:
            return super().forward(
                input_ids, position_ids, attention_mask, labels=labels, loss_mask=loss_mask, **kwargs
            )
        with engine.without_postprocess(self):
            hidden = super().forward(input_ids, position_ids, attention_mask, **kwargs)
        return self._losses(hidden, labels, loss_mask)

    def _postprocess(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """The last step of Megatron-Core's forward (from 0.14 on); with labels, `forward`'s losses."""
        if labels is None:
            return super()._postprocess(*args, labels=labels, **kwargs)
        return self._losses(kwargs["hidden_states"], labels, kwargs["loss_mask"])

    def _losses(self, hidden: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        """float32 [b, s] from hidden [s, b, h], or this rank's part of s under sequence parallelism."""
        await_weights(self.output_layer)
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        hidden = enter(hidden, self.config)
        first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
        num_tokens = min(max(self._num_tokens - first, 0), weight.shape[0])
        vocabulary = Vocabulary(parallel_state.get_tensor_model_parallel_group(), first, num_tokens)
        needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
        losses = self._cross_entropy.apply(
            hidden.flatten(0, 1), weight, labels.t().reshape(-1), loss_mask.t().reshape(-1).float(), vocabulary,
            self._kernels, needs_gradient,
        )  # fmt: skip
        return losses.view(labels.shape[1], labels.shape[0]).t()
