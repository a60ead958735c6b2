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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from grade_kernels.backends.chunks import Sizes
from grade_kernels.backends.interface import Backend
from grade_kernels.backends.records import GradientRule, Head, Noise, Posterior, Rows, Sample, Softmax, Support

__all__ = [
    "BACKENDS",
    "HEAD_WAYS",
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
    "selected",
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
# Backends with two ways through a head, and those ways. "triton:chunks" is the backend triton that goes one of them.
_WITH_HEAD_WAYS = ("triton", "cuda")
HEAD_WAYS = ("auto", "tiles", "chunks")
_override: str | None = None


@functools.cache
def get(name: str) -> Backend:
    """The backend of a name, or of a name and a way through a head; one object per process."""
    plain, _, way = name.partition(":")
    module, _, kind = _CLASSES[plain].partition(":")
    make: Callable[..., Backend] = getattr(importlib.import_module(module), kind)
    return make(head_way=way) if way else make()


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
    """A backend's name, without the way through a head that may stand behind it; an error where there is no such."""
    plain, colon, way = name.partition(":") if isinstance(name, str) else (name, "", "")
    if plain not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the known ones are {', '.join(BACKENDS)}")
    if colon and (plain not in _WITH_HEAD_WAYS or way not in HEAD_WAYS):
        raise ValueError(
            f"unknown backend {name!r}; {' and '.join(_WITH_HEAD_WAYS)} may be followed by a way through a head: "
            f"{', '.join(f':{known}' for known in HEAD_WAYS)}"
        )
    return plain


def _head_way() -> str:
    """The way through a head that the environment asks for."""
    way = os.environ.get("GRADE_KERNELS_HEAD") or "auto"
    if way not in HEAD_WAYS:
        raise ValueError(f"GRADE_KERNELS_HEAD must be one of {', '.join(HEAD_WAYS)}, got {way!r}")
    return way


def set_backend(name: str | None) -> None:
    """Use one backend for every later call in this process; None lets each call choose by device again.

    `triton` has two ways through a head (see `backends.triton.head_choice`) and chooses one. "triton:tiles" and
    "triton:chunks" are that backend with the choice made.

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
    backend has no kernels: float64 through a head, which is for checking.

    With `head` the name that is returned says which of two ways goes through it, where that was chosen: by "triton:chunks" in
    the place of "triton", else by the environment variable GRADE_KERNELS_HEAD (tiles, chunks or auto). The name is saved
    with a call, so backward goes the same way.

    Afterwards `answered_by` in `ops/registry.py` may still send the call to the reference: under derivatives that no
    operation has a rule for (`ops/transforms.py`).
    """
    chosen = _override or os.environ.get("GRADE_KERNELS_BACKEND") or None
    if chosen is not None:
        name = _known(chosen)
        reason = _why_not_here(name, device)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot serve tensors on device {str(device)!r}: {reason}")
    else:
        name = "cpu" if device.type == "cpu" else "triton"
        if _why_not_here(name, device) is not None:
            return "torch"
    if not _serves(name, dtype, head):
        return "torch"
    if not head or name not in _WITH_HEAD_WAYS:
        return name
    way = chosen.partition(":")[2] if chosen is not None and ":" in chosen else _head_way()
    return name if way == "auto" else f"{name}:{way}"


def selected(name: str) -> Backend | None:
    """The backend of that name if `select` chooses it for rows of logits on its own device, else None.

    It is for a backend that serves every dtype, and takes a fraction of the time of `select`.
    """
    wanted = _override or os.environ.get("GRADE_KERNELS_BACKEND")
    backend = get(name)
    return backend if (not wanted or wanted == name) and backend.why_unavailable() is None else None
