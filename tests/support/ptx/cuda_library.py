"""The operations of csrc/cuda, whose kernels run in the simulator as nvcc compiles them for sm_80.

The host's part is compiled as it is, but for the launch (`recorded/`), which hands a kernel's argument to the simulator. The
kernels are nvcc's PTX. Loading registers the operations that the compiled CUDA library would, for CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support import ROOT
from tests.support.ptx.machine import execute, translated
from tests.support.ptx.translation import Translation
from tests.support.ptx.triton_driver import CAPABILITY, LAUNCHED, buffers_of

__all__ = ["load", "nvcc_version", "why_unavailable"]

_TORCH = Path(torch.__file__).parent / "include"
_HERE = Path(__file__).with_name("recorded")
_DEVICE = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
_HOST = [*_DEVICE, ROOT / "csrc" / "cuda" / "rows_ops.cpp", _HERE / "recorder.cpp"]
_DEFINES = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
_INCLUDES = ["-isystem", str(_TORCH), "-I", str(ROOT / "csrc")]
_FOLDER = ROOT / "build" / "simulated"
_Told = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)


def why_unavailable() -> str | None:
    for program in ("nvcc", "c++", "c++filt"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    return None


@functools.cache
def nvcc_version() -> str:
    found = re.search(r"release (\d+\.\d+)", _output(["nvcc", "--version"]))
    assert found is not None
    return found[1]


def _output(command: Sequence[str], given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _made(name: str, command: list[str], sources: list[Path]) -> Path:
    """What a compiler makes of sources, kept until these or a header change."""
    state = hashlib.sha256(repr([name, command, torch.__version__, nvcc_version()]).encode())
    headers = [path for folder in ("common", "cuda") for path in (ROOT / "csrc" / folder).glob("*.h")]
    for path in sorted([*sources, *headers, *_HERE.rglob("*.h")]):
        state.update(path.read_bytes())
    path = _FOLDER / f"{state.hexdigest()[:16]}-{name}"
    if not path.exists():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}{path.suffix}")
        _output([*command, *map(str, sources), "-o", str(fresh)])
        os.replace(fresh, path)
    return path


@functools.cache
def _kernels() -> dict[str, Translation]:
    """nvcc's kernels by the C++ name of their type."""
    found: dict[str, Translation] = {}
    for source in _DEVICE:
        command = ["nvcc", "-ptx", f"-arch=sm_{CAPABILITY}", "-O3", *_DEFINES, *_INCLUDES]
        translations = translated(_made(f"{source.stem}.ptx", command, [source]).read_text())
        readable = _output(["c++filt"], "\n".join(translations)).splitlines()
        for name, translation in zip(readable, translations.values(), strict=True):
            kind = re.fullmatch(r"void gk::cuda::run_kernel<(.*?) ?>\((.*)\)", name)
            assert kind is not None, name
            # A kernel of a header is in each file that uses it, and the same; one of a file is that file's own.
            assert kind[1] not in found or "(anonymous" not in kind[1], f"two kernels are called {kind[1]}"
            found[kind[1]] = translation
    return found


class _Kernels:
    """The operations. While one runs, its tensors are the memory that kernels may touch."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.error: BaseException | None = None
        self.told = _Told(self._launched)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(torch.ops.grade_kernels_cuda, name)

        def call(*arguments: Any) -> Any:
            self.tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            result = operation(*arguments)
            error, self.error = self.error, None
            if error is not None:
                raise error
            return result

        return call

    def _launched(self, kernel: bytes, argument: int, size: int, blocks: int, threads: int) -> None:
        try:
            name = _output(["c++filt", "-t"], kernel.decode()).strip()
            short = re.sub(r"gk::cuda::|gk::|\(anonymous namespace\)::", "", name)
            LAUNCHED[short] += 1
            if self.error is None:
                given = ctypes.string_at(argument, size)
                execute(_kernels()[name], (blocks, 1, 1), threads, given, 0, buffers_of(self.tensors))
        except BaseException as error:  # it may not pass through C++
            self.error = error


@functools.cache
def load() -> None:
    """Compile (where sources changed), load, and have the backend `cuda` call it."""
    from grade_kernels.backends.cuda import backend

    flags = ["-O1", "-fPIC", "-fvisibility=hidden", "-shared", *_DEFINES, "-I", str(_HERE), *_INCLUDES]
    flags += ["-Wl,--no-as-needed", "-L", str(_TORCH.with_name("lib")), "-ltorch_cpu"]
    library = _made("host.so", ["c++", *flags, "-x", "c++"], _HOST)
    torch.ops.load_library(str(library))
    kernels = _Kernels()
    ctypes.CDLL(str(library)).gk_set_on_launch(kernels.told)
    backend.cuda_kernels = lambda: kernels  # type: ignore[assignment]
