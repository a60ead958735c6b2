"""What the tests of kernels for rows of given logits share: seeds, rows, and where kernels run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from grade_kernels import backends
from grade_kernels.backends import Backend
from tests.support import cuda_host
from tests.support.interpreter import INTERPRETED
from tests.support.needs import needs_backend, needs_cuda_on_the_host
from tests.support.ptx.setting import SIMULATED

if SIMULATED:
    from tests.support.ptx import cuda_library

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
SEED = -2401053089206453570
# (row id, token) under SEED whose word is below 256, found by search: 211, 13 and 249.
REFINED = [(-34359738340, 166090), (-34359738325, 104037), (-34359738048, 196101)]
ROWS = torch.tensor([5, -7, 2**40 + 3, 2**33])
# The backends for GPUs, which without one run in Triton's interpreter and on the host.
GPU_BACKENDS = [
    pytest.param("triton", marks=[needs_backend("triton"), *([INTERPRETED] if DEVICE == "cpu" else [])]),
    pytest.param("cuda", marks=needs_backend("cuda") if DEVICE == "cuda" else needs_cuda_on_the_host()),
]


def loaded(name: str) -> Backend:
    """A backend that can be called where tests of kernels run."""
    if name == "cuda" and DEVICE == "cpu":
        (cuda_library if SIMULATED else cuda_host).load()
    return backends.get(name)


def logits_of(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)


def on(*tensors: Any) -> tuple[Any, ...]:
    """The arguments, tensors among them and in records on the device."""
    return tuple(
        t.to(DEVICE) if isinstance(t, torch.Tensor) else type(t)(*on(*t)) if isinstance(t, tuple) else t
        for t in tensors
    )


def seed_tensor(value: int = SEED) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)
