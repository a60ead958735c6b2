"""How Python calls the kernels of csrc: their namespaces, the layouts that they take, and numbers of their enumerations."""

from __future__ import annotations

import torch
from torch._ops import _OpNamespace

__all__ = ["ESTIMATOR", "contiguous", "cpu_kernels", "cuda_kernels", "unit_stride"]

# csrc/common/estimators.h's Estimator.
ESTIMATOR = {"ste": 0, "soft": 0, "st": 1, "reinmax": 2}


def cpu_kernels() -> _OpNamespace:
    """The functions of csrc/cpu, once the library is loaded."""
    return torch.ops.grade_kernels_cpu


def cuda_kernels() -> _OpNamespace:
    """The functions of csrc/cuda, once the library is loaded."""
    return torch.ops.grade_kernels_cuda


def unit_stride(rows: torch.Tensor) -> torch.Tensor:
    """A tensor whose columns lie side by side, as the kernels want it; rows may lie anywhere. Other layouts are copied."""
    if rows.stride(1) == 1 or rows.shape[1] == 1:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)  # contiguous() keeps an empty tensor's strides


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """An optional argument in plain layout."""
    return None if x is None else x.contiguous()
