"""Gradient checkpointing: which kind of it can be differentiated to the inputs of a model alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn

__all__ = ["check_checkpointing", "is_reentrant"]


def is_reentrant(arguments: Mapping[str, object]) -> bool:
    """Whether `torch.utils.checkpoint` is reentrant with these arguments. It is where they do not say."""
    word = arguments.get("use_reentrant")
    return word is None or bool(word)


def check_checkpointing(model: nn.Module) -> None:
    """No reentrant gradient checkpointing, or ValueError.

    A sweep of the replay asks for the gradient of the inputs alone, which the reentrant kind does not give.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = isinstance(function, functools.partial) and is_reentrant(function.keywords)
        if getattr(module, "gradient_checkpointing", False) and reentrant:
            raise ValueError(
                "model must not have reentrant gradient checkpointing, which gives no gradient to the inputs alone: "
                'enable it with {"use_reentrant": False}'
            )
