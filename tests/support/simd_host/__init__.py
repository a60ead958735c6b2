"""The SIMD functions of csrc/cpu (simd.h, noise.h, products/bf16_split.inl) as functions of numpy arrays."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from tests.support import ROOT

LANES = {"generic": 4, "avx2": 8, "avx512": 16}  # kLanes of csrc/cpu/simd.h
ISAS = tuple(LANES)
SOURCE = Path(__file__).with_name("host.cpp")
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]  # as setup.py's
FLAGS += ["-isystem", str(Path(torch.__file__).parent / "include"), "-I", str(ROOT / "csrc")]


@functools.cache
def why_not(isa: str) -> str | None:
    """None, or the reason why functions of an instruction set cannot run here."""
    if _compiler() is None:
        return "there is no C++ compiler"
    wanted = {"generic": [], "avx2": ["avx2", "fma", "f16c"], "avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl"]}
    if not wanted[isa]:
        return None
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "there is no /proc/cpuinfo to look for instruction sets in"
    missing = [flag for flag in wanted[isa] if flag not in flags]
    return f"this processor has no {', '.join(missing)}" if missing else None


def has_bfloat16() -> bool:
    """Whether the processor has AVX-512's instructions for bfloat16."""
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()


def call(isa: str, name: str, x: np.ndarray, out_dtype: type, parameter: float = 0.0, parts: int = 0) -> np.ndarray:
    """One function at all of x, in the dtype it takes; bfloat16 and float16 come and go as uint16."""
    padded = np.resize(np.ascontiguousarray(x), -(-len(x) // 64) * 64)
    out = np.zeros((len(padded), parts) if parts else len(padded), dtype=out_dtype)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (padded, out))
    assert _library(isa).apply(name.encode(), *pointers, ctypes.c_int64(len(padded)), ctypes.c_float(parameter)), name
    return out[: len(x)]


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@functools.cache
def _library(isa: str) -> ctypes.CDLL:
    flags = FLAGS if isa == "generic" else [*FLAGS, f"-DGK_TEST_{isa.upper()}"]
    compiler = _compiler()
    assert compiler is not None
    state = hashlib.sha256(repr([compiler, flags, torch.__version__]).encode())
    for path in sorted([SOURCE, *(ROOT / "csrc" / "common").glob("*.h"), *(ROOT / "csrc" / "cpu").rglob("*.[hi]*")]):
        state.update(path.read_bytes())
    library = ROOT / "build" / f"simd-{isa}-{state.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        for old in library.parent.glob(f"simd-{isa}-*.so"):
            old.unlink(missing_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}.tmp")  # another process may be at it, too
        command = [compiler, *flags, str(SOURCE), "-shared", "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(fresh, library)
    loaded = ctypes.CDLL(str(library))
    loaded.apply.restype = ctypes.c_bool
    return loaded
