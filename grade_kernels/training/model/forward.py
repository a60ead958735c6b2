"""How a causal language model is run: modes, positions, caches and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = [
    "cache_arguments",
    "cache_name",
    "cache_of",
    "evaluating",
    "last_hidden_state",
    "position_arguments",
    "position_ids",
]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens alone, `[B, L]`; 0 under left padding."""
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)


def position_arguments(module: nn.Module, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` for a module that takes them; the others (ALiBi) read the mask."""
    return {"position_ids": positions} if "position_ids" in inspect.signature(module.forward).parameters else {}


def cache_name(module: nn.Module) -> str | None:
    """The name that a module's forward has for its key-value cache; None where it takes no cache.

    transformers calls it `past_key_values`, and `cache` from 5.24 on.
    """
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in parameters), None)


def cache_arguments(module: nn.Module, cache: object) -> dict[str, Any]:
    """Keywords that hand a key-value cache, or None to begin with, to a module that takes one."""
    return {str(cache_name(module)): cache, "use_cache": True}


def cache_of(output: object) -> Any:
    """The key-value cache that a module returns; None without one."""
    # From transformers 5.24 on an output has both names, and warns where the old one is read. The old name can go when
    # releases before 5.24 are no longer supported.
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)


def last_hidden_state(output: Any) -> torch.Tensor:
    """The hidden states `[B, L, H]` that a backbone returns."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state
