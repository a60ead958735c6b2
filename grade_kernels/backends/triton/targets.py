"""The device that kernels are launched on, or Triton's interpreter in its place."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # fixed when the kernels are decorated, too
TRITON: tuple[int, int] = tuple(int(part) for part in triton.__version__.split(".")[:2])  # type: ignore[assignment]


class Target(NamedTuple):
    """What sizes and compiler options depend on.

    Attributes:
        backend: Triton's name for it: "cuda", "hip" or another; or "interpreter".
        warp_size: threads of a warp.
        capability: the compute capability, such as 90; 0 outside NVIDIA.
    """

    backend: str
    warp_size: int
    capability: int


def current_target() -> Target:
    """Where kernels are launched now."""
    if INTERPRETED:
        return Target("interpreter", 128, 0)  # NumPy's cost is per operation, so strips are wide
    active = triton.runtime.driver.active.get_current_target()
    return Target(active.backend, active.warp_size, active.arch if active.backend == "cuda" else 0)


def compiler_options(backend: str) -> dict[str, Any]:
    """Compiler options of all kernels for a Triton backend."""
    if backend != "hip":
        return {}
    from triton.backends.amd.compiler import HIPOptions

    # AMD logarithms and exponentials otherwise spend four instructions on denormal numbers, as NVIDIA's do not.
    options: dict[str, Any] = {"allow_flush_denorm": True}
    if "llvm_fn_attrs" in HIPOptions.__dataclass_fields__:  # not in Triton's older versions
        options["llvm_fn_attrs"] = "amdgpu-unroll-threshold=2000"  # by default LLVM would leave Philox in a loop
    return options


def launching(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's device the current one, which is where Triton launches."""
    if tensor.device.type != "cpu":
        return getattr(torch, tensor.device.type).device(tensor.device)
    if INTERPRETED:
        import numpy as np

        return np.errstate(all="ignore")  # the interpreter is NumPy, which warns of the infinities that are meant
    return nullcontext()
