"""The parts of a causal language model, and the head that gives its logits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grade_kernels.backends import Head
from grade_kernels.training.allowed_tokens import AllowedTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LanguageModel", "active_layer"]


@dataclass(frozen=True)
class LanguageModel:
    """The parts of a causal language model whose logits are `softcap((logit_scale * hidden) @ weight.T + bias)`.

    Attributes:
        whole: the model as the training loop holds it, wrappers and all. Forward passes with a graph go through it, so
            that the wrappers' hooks run.
        model: the model itself, out of every wrapper.
        backbone: everything below the head; returns `last_hidden_state`.
        lm_head: the module that holds the head's `weight` `[V, H]` and perhaps its `bias` `[V]`.
        embedding: the module that looks up the input embeddings: `embed_scale * weight[ids]`.
        logit_scale: factor on the hidden states before the head.
        softcap: c in `c * tanh(l / c)`, or None.
        reads_left_padding: whether a row that is padded on the left has the hidden states of the row alone. Not so
            where positions are counted from the row's start whatever the mask says (Bart), or where a state that stands
            for a cache counts padding (MiniMax).
        allowed: the tokens that may be sampled.
    """

    whole: nn.Module
    model: PreTrainedModel
    backbone: nn.Module
    lm_head: nn.Module
    embedding: nn.Module
    logit_scale: float
    softcap: float | None
    reads_left_padding: bool = True
    allowed: AllowedTokens = field(default_factory=AllowedTokens)

    @property
    def vocab_size(self) -> int:
        """Number of tokens the head scores."""
        return active_layer(self.lm_head).weight.shape[0]

    @property
    def table(self) -> torch.Tensor:
        """The input embedding table `[V, D]`, without the model's scale."""
        return active_layer(self.embedding).weight

    @property
    def embed_scale(self) -> torch.Tensor | float:
        """Factor between a row of the table and the embedding the model reads (1 for most; Gemma has one)."""
        embedding = active_layer(self.embedding)
        scale = getattr(embedding, "embed_scale", 1.0)
        return scale.to(embedding.weight.dtype) if isinstance(scale, torch.Tensor) else float(scale)

    def allowing(self, allowed: AllowedTokens) -> LanguageModel:
        """The same model, which samples nothing but these tokens."""
        return replace(self, allowed=allowed)

    def unmasked_head(self, hidden: torch.Tensor) -> Head:
        """The head over hidden states `[..., H]`, with the logits of all tokens.

        The head's product takes the states scaled and in the head's dtype.
        """
        layer = active_layer(self.lm_head)
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        return Head(hidden.to(layer.weight.dtype), layer.weight, layer.bias, self.softcap)

    def head(self, hidden: torch.Tensor, first: bool = False) -> Head:
        """The head over hidden states `[..., H]`, with the logit -inf of tokens that are not allowed.

        Args:
            hidden: the backbone's.
            first: whether the first tokens of completions are drawn from them.
        """
        head = self.unmasked_head(hidden)
        return head._replace(bias=self.allowed.bias(head.weight, head.bias, first))

    def heads(self, hidden: torch.Tensor) -> list[tuple[slice, Head]]:
        """The head over the hidden states `[B, T, H]` of completions, for each span of positions that has one mask."""
        head = self.unmasked_head(hidden)
        return [
            (
                span,
                head._replace(hidden=head.hidden[:, span], bias=self.allowed.bias(head.weight, head.bias, first)),
            )
            for span, first in self.allowed.spans(hidden.shape[1])
        ]


def active_layer(module: nn.Module) -> Any:
    """The layer at work where PEFT keeps a trained copy beside the original (`modules_to_save`)."""
    wrapper: Any = module
    copies = getattr(wrapper, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    return copies[wrapper.active_adapters[0]]
