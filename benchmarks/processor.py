"""Which vector instructions ours and torch use, and how both are held to the same."""

from __future__ import annotations

import os
from pathlib import Path

import torch

ASKED = "GRADE_KERNELS_CPU_ISA"  # csrc/cpu/isa.h reads it, when the library loads
# What holds torch, MKL, oneDNN and the compiler behind torch.compile to the same. Each is read when it is first needed.
_HELD = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    }
}
_FLAGS = {"amx": {"amx_tile", "amx_bf16"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2"}}


def hold_torch() -> None:
    """Where GRADE_KERNELS_CPU_ISA holds ours to AVX2, hold torch to it as well: the race would be unfair otherwise.

    Call it before torch computes anything. A variable that is set already stays as it is.

    Raises:
        RuntimeError: torch has chosen its instructions already.
    """
    for name, value in _HELD.get(os.environ.get(ASKED, ""), {}).items():
        os.environ.setdefault(name, value)
    wanted, used = os.environ.get("ATEN_CPU_CAPABILITY", ""), torch.backends.cpu.get_cpu_capability()
    if wanted == "avx2" and used != "AVX2":
        raise RuntimeError(f"ATEN_CPU_CAPABILITY is {wanted} and torch uses {used}: set it before torch is imported")


def kind() -> str:
    """Of the processor, by what ours uses of it: amx, avx512, avx2 or generic. Kept runs are named after it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    able = [name for name, needed in _FLAGS.items() if needed <= flags]
    asked = os.environ.get(ASKED)
    return next((name for name in able if asked in (None, name)), "generic")
