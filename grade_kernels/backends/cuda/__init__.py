"""CUDA C++ kernels of csrc/cuda for rows of given logits. No GPU has run them yet: see docs/gpu-status.md.

What they do not serve goes to other backends: float64 to `torch`, and the functions through a head to `triton` where
Triton is available, else to `torch`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from grade_kernels import _build, backends
from grade_kernels.backends.cuda.rows import one_hot, sample, softmax, softmax_backward

_HEAD = (
    "exact_weights",
    "gather_dot",
    "gather_sum",
    "head_logits_at",
    "head_sample",
    "head_scores",
    "head_softmax",
    "product",
    "scatter_sum",
    "weight_terms",
    "weighted_sum",
)

__all__ = [*_HEAD, "one_hot", "sample", "softmax", "softmax_backward", "why_not_device", "why_unavailable"]


def __getattr__(name: str) -> Any:
    """The functions through a head, of the backend that has them."""
    if name not in _HEAD:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(backends.module("triton" if backends.status()["triton"] is None else "torch"), name)


@functools.cache
def why_unavailable() -> str | None:
    """None if the kernels were compiled, there is a GPU, and they load (which this does, once), else the reason."""
    path = _build.cuda_library_path()
    if path is None:
        return _build.missing_cuda_reason()
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA kernels do not load: {error}"
    return None


def why_not_device(device: torch.device) -> str | None:
    """None for an NVIDIA GPU that there is code for, the oldest of setup.py's CUDA_ARCHITECTURES or later."""
    if device.type != "cuda":
        return "it runs on NVIDIA GPUs only"
    old = torch.cuda.get_device_capability(device) < (8, 0)
    return "it needs a GPU of compute capability 8.0 or later" if old else None
