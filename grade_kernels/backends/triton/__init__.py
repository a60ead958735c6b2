"""Fused Triton kernels, for any device with an active Triton driver and for the CPU through Triton's interpreter.

`philox` holds the device functions that turn (seed, row, token) into noise; each other module holds the kernels and the
launcher of one function of the backend interface, or of those that share a kernel. `head` holds the tile of a product
with an LM head that `head_sampling` and `head_relaxation` consume, `head_support` what becomes of its candidates.
Importing this package does not import Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

# Where each function of the interface lives.
_HOME = {
    "one_hot": f"{__name__}.onehot",
    "sample": f"{__name__}.sampling",
    "softmax": f"{__name__}.relaxation",
    "softmax_backward": f"{__name__}.gradient",
    "head_sample": f"{__name__}.head_sampling",
    "head_scores": f"{__name__}.head_sampling",
    "head_softmax": f"{__name__}.head_relaxation",
    "head_logits_at": f"{__name__}.gather",
    "gather_dot": f"{__name__}.gather",
    "gather_sum": f"{__name__}.gather",
    "product": f"{__name__}.gather",
    "scatter_sum": f"{__name__}.gather",
    "exact_weights": f"{__name__}.gather",
    "weight_terms": f"{__name__}.gather",
    "weighted_sum": f"{__name__}.gather",
}

__all__ = [*_HOME, "why_not_device", "why_unavailable"]


def __getattr__(name: str) -> Any:
    """The functions of the interface, imported (and Triton with them) when they are first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = function
    return function


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _driver() -> tuple[str | None, str | None]:
    """Torch's device type for the active Triton driver and None, or None and the reason why there is none."""
    from triton.runtime import driver

    try:
        return driver.active.get_active_torch_device().type, None
    except Exception as error:  # every vendor's driver fails in its own way
        return None, str(error).strip() or type(error).__name__


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_unavailable() -> str | None:
    """None if Triton is installed and has a driver or its interpreter is on, else the reason."""
    if not _installed():
        return "Triton is not installed"
    if _interpreting():
        return None
    _, reason = _driver()
    return None if reason is None else f"Triton has no active driver and TRITON_INTERPRET is not 1 ({reason})"


def why_not_device(device: torch.device) -> str | None:
    """None for a device that the active Triton driver (or the interpreter) serves, else the reason."""
    if (reason := why_unavailable()) is not None:
        return reason
    served = "cpu" if _interpreting() else _driver()[0]
    if device.type == served:
        return None
    by = "Triton's interpreter (TRITON_INTERPRET=1)" if _interpreting() else "the active Triton driver"
    return f"{by} serves {served!r} tensors"
