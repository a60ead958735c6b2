"""What setup.py left behind: the C++ and the CUDA library, or the reason why there is none."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["build_info", "cuda_library_path", "library_path", "missing_cuda_reason", "missing_reason"]

_PACKAGE = Path(__file__).resolve().parent


def library_path() -> Path | None:
    """The library of csrc/cpu for `torch.ops.load_library`, or None where it was not built."""
    for name in ("_C.so", "_C.dylib"):
        if (_PACKAGE / name).is_file():
            return _PACKAGE / name
    return None


def cuda_library_path() -> Path | None:
    """The library of csrc/cuda for `torch.ops.load_library`, or None where it was not built."""
    path = _PACKAGE / "_cuda.so"
    return path if path.is_file() else None


def build_info() -> dict[str, str | None]:
    """What setup.py recorded: `compiler`, `flags` and `torch` of a built library, or the `reason` why there is none.

    Of the CUDA kernels: `cuda_compiler` and `cuda_flags`, or `cuda_reason`.
    Empty where setup.py never ran, as in a source tree that is not installed, and where the record is broken.
    """
    try:
        return dict(json.loads((_PACKAGE / "_build_info.json").read_text()))
    except (OSError, ValueError):
        return {}


def missing_reason() -> str | None:
    """None where the library is there, otherwise one sentence that says why it is not."""
    if library_path() is not None:
        return None
    reason = build_info().get("reason") or "csrc was never compiled here; run `pip install -e .`"
    return f"the C++ library was not built: {reason}"


def missing_cuda_reason() -> str | None:
    """None where the CUDA library is there, otherwise one sentence that says why it is not."""
    if cuda_library_path() is not None:
        return None
    reason = build_info().get("cuda_reason") or "csrc/cuda was never compiled here; run `pip install -e .`"
    return f"this build has no CUDA kernels: {reason}"
