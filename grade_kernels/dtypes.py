"""Which arithmetic serves which dtype."""

from __future__ import annotations

import torch

__all__ = ["compute_dtype"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic that serves a dtype: float64 for itself, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
