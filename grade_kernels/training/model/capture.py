"""Embeddings and hidden states of a forward pass through the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from grade_kernels.training.model.forward import last_hidden_state
from grade_kernels.training.model.parts import LanguageModel

__all__ = ["Capture"]


class Capture:
    """While entered, sees the input embeddings and the final hidden states of a forward pass through the whole model.

    The forward pass goes through the model that the training loop holds, wrappers and all, so that their hooks run;
    only its logits are not wanted.

    Args:
        parts: the model's parts.
        edit: called with the embeddings `[B, L, D]` of the pass, returns what the model shall read instead.
    """

    embedded: torch.Tensor
    hidden: torch.Tensor

    def __init__(self, parts: LanguageModel, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._parts, self._edit = parts, edit

    def __enter__(self) -> Capture:
        def see_embedding(module: nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
            output = self._edit(output)
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()
            self.embedded = output
            # CTRL scales in place what it gets. Then the gradient of `embedded` would be that of the scaled embeddings,
            # so the model gets a copy.
            return output.clone()

        def see_hidden(module: nn.Module, arguments: object, output: object) -> None:
            self.hidden = last_hidden_state(output)

        self._hooks = [
            self._parts.embedding.register_forward_hook(see_embedding),
            self._parts.backbone.register_forward_hook(see_hidden),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
