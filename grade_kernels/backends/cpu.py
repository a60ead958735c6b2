"""The native CPU backend: C++ kernels of csrc/cpu."""

from __future__ import annotations

import torch


def why_unavailable() -> str | None:
    """None if the compiled library is present and loads, else the reason."""
    return "not built"


def why_not_device(device: torch.device) -> str | None:
    """None for the CPU."""
    return None if device.type == "cpu" else "it runs on the CPU only"
