"""Fused Triton kernels."""

from __future__ import annotations

import torch


def why_unavailable() -> str | None:
    """None if Triton is installed and has a driver or its interpreter is on, else the reason."""
    return "not there yet"


def why_not_device(device: torch.device) -> str | None:
    """None for a device that the active Triton driver (or the interpreter) serves."""
    return None
