"""The native CPU backend: C++ kernels of csrc/cpu."""

from __future__ import annotations

import functools

import torch

from grade_kernels import _build
from grade_kernels.backends.cpu.head import (
    exact_weights,
    gather_dot,
    gather_sum,
    head_logits_at,
    head_sample,
    head_scores,
    head_softmax,
    product,
    scatter_sum,
    weight_terms,
    weighted_sum,
)
from grade_kernels.backends.cpu.rows import one_hot, sample, softmax, softmax_backward

__all__ = [
    "exact_weights",
    "gather_dot",
    "gather_sum",
    "head_logits_at",
    "head_sample",
    "head_scores",
    "head_softmax",
    "one_hot",
    "product",
    "sample",
    "scatter_sum",
    "softmax",
    "softmax_backward",
    "weight_terms",
    "weighted_sum",
    "why_not_device",
    "why_unavailable",
]


@functools.cache
def why_unavailable() -> str | None:
    """None if the compiled library is present and loads (which this does, once), else the reason."""
    path = _build.library_path()
    if path is None:
        return _build.missing_reason()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the C++ kernels do not load: {error}"
    return None


def why_not_device(device: torch.device) -> str | None:
    """None for the CPU."""
    return None if device.type == "cpu" else "it runs on the CPU only"
