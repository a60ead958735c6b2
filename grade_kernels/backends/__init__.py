"""One place that chooses which backend serves a call.

`interface.Backend` says what a backend is, and `records` what it takes and returns. `torch` implements all of it in plain
PyTorch. `cpu` and `triton` inherit from `torch` and have kernels of their own, and `cuda` inherits from `triton`. The
backend `reference` is no such class: with it the public functions call `grade_kernels.reference`, and autograd
differentiates that.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grade_kernels.backends.chunks import Sizes
from grade_kernels.backends.interface import Backend
from grade_kernels.backends.records import GradientRule, Head, Noise, Posterior, Rows, Sample, Softmax, Support

__all__ = [
    "BACKENDS",
    "Backend",
    "GradientRule",
    "Head",
    "Noise",
    "Posterior",
    "Rows",
    "Sample",
    "Sizes",
    "Softmax",
    "Support",
    "available_backends",
    "get",
    "select",
    "set_backend",
    "status",
    "use_backend",
]

# Where the class of each backend is; a module is imported when its backend is first asked for.
_CLASSES = {
    "torch": "grade_kernels.backends.torch.backend:TorchBackend",
    "cpu": "grade_kernels.backends.cpu.backend:CpuBackend",
    "triton": "grade_kernels.backends.triton.backend:TritonBackend",
    "cuda": "grade_kernels.backends.cuda.backend:CudaBackend",
}
BACKENDS = ("reference", *_CLASSES)
_override: str | None = None


@functools.cache
def get(name: str) -> Backend:
    """The backend of a name, one object per process."""
    module, _, kind = _CLASSES[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), kind)()
    return backend


def _why_not(name: str) -> str | None:
    """None if a backend can run on this machine at all, else the reason why it cannot."""
    return None if name == "reference" else get(name).why_unavailable()


def _why_not_here(name: str, device: torch.device) -> str | None:
    """None if a backend can serve tensors of a device here, else the reason. torch.compile takes it for a constant."""
    return None if name == "reference" else get(name).why_unavailable() or get(name).why_not_device(device)


def _serves(name: str, dtype: torch.dtype, head: bool) -> bool:
    return name == "reference" or get(name).serves(dtype, head=head)


# torch.compiler.assume_constant_result sets this attribute, too. But to call it would import the compiler and Triton
# whenever this package is imported.
_why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def status() -> dict[str, str | None]:
    """Every known backend with None if it is available here, else the reason why it is not."""
    return {name: _why_not(name) for name in BACKENDS}


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine."""
    return [name for name, reason in status().items() if reason is None]


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the known ones are {', '.join(BACKENDS)}")
    return name


def set_backend(name: str | None) -> None:
    """Use one backend for every later call in this process; None lets each call choose by device again.

    Raises:
        ValueError: a name that is not known, or a backend that cannot run on this machine.
    """
    global _override
    if name is not None and (reason := _why_not(_known(name))) is not None:
        raise ValueError(f"backend {name!r} is not available: {reason}")
    _override = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Use one backend inside a `with` block (process-wide, as `set_backend`). Raises as `set_backend` does."""
    global _override
    before = _override
    set_backend(name)
    try:
        yield
    finally:
        _override = before


def select(device: torch.device, dtype: torch.dtype, *, head: bool = False) -> str:
    """The backend for rows of logits of this device and dtype, or with `head` for hidden states of it.

    An explicit choice (`use_backend`, `set_backend`, then the environment variable GRADE_KERNELS_BACKEND) wins, and
    raises where it cannot serve the device. Otherwise: `cpu` or `triton` for their devices, else `torch`. Nobody has
    measured `cuda` against `triton` yet, so it runs only where it is asked for. `torch` serves dtypes for which the
    backend has no kernels: float64 through a head, which is for checking. Afterwards `answered_by` in `ops/registry.py`
    may still send the call to the reference: under derivatives that no operation has a rule for (`ops/transforms.py`).
    """
    name = _override or os.environ.get("GRADE_KERNELS_BACKEND") or None
    if name is not None:
        reason = _why_not_here(_known(name), device)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot serve tensors on device {str(device)!r}: {reason}")
    else:
        name = "cpu" if device.type == "cpu" else "triton"
        if _why_not_here(name, device) is not None:
            return "torch"
    return name if _serves(name, dtype, head) else "torch"
