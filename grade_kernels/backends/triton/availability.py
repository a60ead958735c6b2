"""Whether Triton can run here, without importing it where it is not installed."""

from __future__ import annotations

import functools
import importlib.util

import torch

__all__ = ["why_not_device", "why_unavailable"]


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


@functools.cache
def _fault_of_interpreter() -> str | None:
    """None, or what this Triton's interpreter does otherwise than GPUs, so that results would be wrong.

    The larger of NaN and a number is the number. Up to Triton 3.7 the interpreter says NaN, and noise would be NaN.
    """
    import numpy as np
    import triton
    from triton.language import float32
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    nan, one = (TensorHandle(np.array([x], np.float32), float32) for x in (np.nan, 1.0))
    if interpreter_builder.create_maxnumf(nan, one).data[0] == 1:
        return None
    return (
        f"the interpreter of Triton {triton.__version__} takes the larger of NaN and 1 for NaN; from 3.8 on it is right"
    )


def why_unavailable() -> str | None:
    """None if Triton is installed and has a driver or its interpreter is on, else the reason."""
    if not _installed():
        return "Triton is not installed"
    if _interpreting():
        return _fault_of_interpreter()
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
