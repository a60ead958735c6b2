"""The CUDA kernels on the host: csrc/cuda compiled as plain C++, a thread block run thread by thread.

Loading it registers the very operations that the compiled CUDA library would (`grade_kernels_cuda`), for CPU tensors,
and `grade_kernels_cuda_host` to look inside. What is left out is what a GPU adds: the launch, shuffles and shared
memory (csrc/cuda/block_device.h), and its own logarithm and exponential (csrc/common/math.h).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

from tests.support import ROOT

TORCH = Path(torch.__file__).parent
SOURCES = [
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
    ROOT / "csrc" / "cuda" / "rows_ops.cpp",
    Path(__file__).with_name("host.cpp"),
]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include"), "-I", str(ROOT / "csrc")]


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def why_unavailable() -> str | None:
    if torch.cuda.is_available():
        return "the compiled library has operations of the same names, and there is a GPU to run them"
    return "there is no C++ compiler" if _compiler() is None else None


@functools.cache
def load() -> None:
    """Compile (where sources changed) and load."""
    reason, compiler = why_unavailable(), _compiler()
    assert reason is None, reason
    assert compiler is not None
    torch.ops.load_library(str(_library(compiler)))


def _library(compiler: str) -> Path:
    state = hashlib.sha256(repr([compiler, FLAGS, torch.__version__]).encode())
    headers = [path for folder in ("common", "cuda") for path in (ROOT / "csrc" / folder).glob("*.h")]
    for path in sorted([*SOURCES, *headers]):
        state.update(path.read_bytes())
    library = ROOT / "build" / f"cuda-host-{state.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        for old in library.parent.glob("cuda-host-*.so"):
            old.unlink(missing_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}.tmp")  # another process may be at it, too
        link = ["-L", str(TORCH / "lib"), "-ltorch_cpu"]
        command = [compiler, *FLAGS, "-x", "c++", *map(str, SOURCES), "-shared", *link, "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(fresh, library)
    return library
