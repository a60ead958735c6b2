"""Builds csrc/cpu into the library `grade_kernels/_C.so`, and csrc/cuda into `grade_kernels/_cuda.so` where torch is a
CUDA build and nvcc is found. Everything else about the package is in pyproject.toml.

The sources use nothing but torch's stable ABI, so one library serves every torch from 2.10 and every Python: it is no
Python extension module, it is loaded by `torch.ops.load_library`, and the wheel is tagged `py3-none-<platform>`. The
CUDA kernels are a library of their own because theirs needs the CUDA libraries of torch, and the other must not.

Whatever prevents the build (no torch, no compiler, a compile error), the install succeeds, says so in one warning, and
leaves the reason in `grade_kernels/_build_info.json`, where `grade-kernels doctor` reads it. Where CUDA is merely
absent, nothing is said.

Environment:
    CXX, CXXFLAGS, LDFLAGS: as usual. MAX_JOBS: how many files to compile at once. CUDA_HOME: where nvcc is.
    GRADE_KERNELS_REQUIRE_CSRC=1: fail instead of warning. For CI and for distributors.
"""

from __future__ import annotations

import filecmp
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))
CUDA_SOURCES = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*") if path.suffix in (".cu", ".cpp"))
HEADERS = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inl"))
MACOS = sys.platform == "darwin"
LIBRARY = "_C.dylib" if MACOS else "_C.so"
CUDA_LIBRARY = "_cuda.so"
INFO = "_build_info.json"
OLDEST_TORCH = (2, 10)
# No -march: each kernel is compiled for several instruction sets, and the right one is chosen when it runs.
OPTIMISE = ["-O3"]  # CXXFLAGS may override this, but not what follows
# Vectors wider than a kernel's instruction set are passed between inlined functions only, so their ABI is no concern.
FLAGS = ["-std=c++20", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
DEFINES = [f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Machine code for these, as far as nvcc knows them (it serves the later minor versions of each, too), and PTX of
# PTX_FOR, from which a driver makes the code of any later GPU.
CUDA_ARCHITECTURES = (80, 90, 100, 120)
PTX_FOR = 90


class CannotBuildError(Exception):
    """Why there will be no library. The message is for the user."""


class NoCudaError(CannotBuildError):
    """Why CUDA kernels are not even tried: nothing is wrong with that."""


def find_torch() -> tuple[Path, str]:
    """Directory and version of the torch to compile against, without importing it.

    pip's isolated builds hide the environment's packages, but not where they are: only torch's headers are needed, and
    since the ABI is stable it is right to take them from there.
    """
    spec = importlib.util.find_spec("torch")
    found = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("purelib", "platlib")]
    for torch in found:
        if (torch / "version.py").is_file():
            break
    else:
        raise CannotBuildError("torch was not found; install it first")
    match = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text())
    if not match:
        raise CannotBuildError(f"could not read the version of the torch in {torch}")
    if (int(match[2]), int(match[3])) < OLDEST_TORCH:
        raise CannotBuildError(f"torch {match[1]} is too old; 2.10 is the oldest that has the stable ABI")
    return torch, match[1]


def find_compiler() -> tuple[list[str], str]:
    """The compiler's command and what it says of itself."""
    if sys.platform == "win32":
        raise CannotBuildError("Windows is not supported by the C++ backend")
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
    else:
        command = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
        if not command:
            raise CannotBuildError("no C++ compiler: none of c++, g++ and clang++ is on PATH, and CXX is not set")
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuildError(f"the C++ compiler `{shlex.join(command)} --version` failed: {error}") from error
    return command, (version.splitlines() or ["unknown"])[0]


def find_nvcc(torch: Path, torch_version: str) -> tuple[str, str]:
    """The nvcc that fits a torch, and what it says of itself."""
    match = re.search(r"^cuda\b.*= '((\d+)\.[^']*)'", (torch / "version.py").read_text(), re.MULTILINE)
    if not match:
        raise NoCudaError(f"torch {torch_version} is no CUDA build")
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCudaError("nvcc was not found: it is neither on PATH nor in CUDA_HOME") from error
    version = re.search(r"release ((\d+)\.\d+)", text)
    if not version or version[2] != match[2]:
        found = version[1] if version else "of an unknown version"
        raise NoCudaError(f"torch {torch_version} is built for CUDA {match[1]}, but nvcc is {found}")
    return nvcc, f"nvcc {version[1]}"


def architecture_flags(nvcc: str) -> list[str]:
    """What to generate: machine code for each architecture that this nvcc knows, and one PTX for what comes later."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in listed]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{PTX_FOR},code=compute_{PTX_FOR}"]


def run(command: list[str]) -> None:
    """Run a build step; its output becomes the reason if it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        # The first error counts; what follows is mostly its echo.
        lines = done.stdout.splitlines()
        first = next((i for i, line in enumerate(lines) if "error" in line), max(0, len(lines) - 8))
        raise CannotBuildError("compilation failed:\n" + "\n".join(lines[first : first + 8]))
    warnings = done.stdout.replace("ninja: no work to do.", "").strip()
    if warnings:
        print(warnings)


def find_ninja() -> str | None:
    """Ninja on PATH, or beside an interpreter whose environment was not activated."""
    beside = shutil.which("ninja", path=str(Path(sys.executable).parent))
    return beside or shutil.which("ninja")


def compile_library(work: Path) -> tuple[Path, dict[str, str]]:
    """Compile and link csrc/cpu; returns the library and what it was built with."""
    if not SOURCES:
        raise CannotBuildError("csrc/cpu has no sources")
    torch, torch_version = find_torch()
    cxx, compiler = find_compiler()
    flags = [*OPTIMISE, *shlex.split(os.environ.get("CXXFLAGS", "")), *FLAGS, *DEFINES]
    link = ["-dynamiclib", "-Wl,-rpath,@loader_path/../torch/lib"] if MACOS else ["-shared"]
    link += ["-L", str(torch / "lib"), "-ltorch_cpu", *shlex.split(os.environ.get("LDFLAGS", ""))]
    library = build(work, LIBRARY, SOURCES, [*cxx, *flags], includes(torch), link)
    return library, {"compiler": compiler, "flags": shlex.join(flags), "torch": torch_version}


def compile_cuda_library(work: Path) -> tuple[Path, dict[str, str]]:
    """Compile and link csrc/cuda; returns the library and what it was built with."""
    torch, torch_version = find_torch()
    nvcc, compiler = find_nvcc(torch, torch_version)
    flags = [*NVCC_FLAGS, *architecture_flags(nvcc), *DEFINES]
    if os.environ.get("CXX"):
        flags += ["-ccbin", os.environ["CXX"]]
    # The runtime is torch's own, so that both mean the same current device.
    link = ["-shared", "-cudart", "shared", "-L", str(torch / "lib"), "-ltorch_cpu", "-ltorch_cuda"]
    library = build(work, CUDA_LIBRARY, CUDA_SOURCES, [nvcc, *flags], includes(torch), link)
    return library, {"cuda_compiler": compiler, "cuda_flags": shlex.join(flags)}


def includes(torch: Path) -> list[str]:
    """Where the headers are: torch's, and csrc's own."""
    return ["-isystem", str(torch / "include"), "-I", str(ROOT / "csrc")]


def build(
    work: Path, name: str, sources: list[Path], compiler: list[str], compile_flags: list[str], link_flags: list[str]
) -> Path:
    """Make a library of sources in a folder: with ninja what has changed, else all of it."""
    library = work / name
    work.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja:
        text = ninja_file(name, sources, [*compiler, *compile_flags], compiler, link_flags)
        (work / "build.ninja").write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        run([ninja, "-C", str(work), "--quiet", *jobs])
    else:
        run([*compiler, *compile_flags, *map(str, sources), *link_flags, "-o", str(library)])
    return library


def ninja_file(
    name: str, sources: list[Path], compile_command: list[str], link_command: list[str], link_flags: list[str]
) -> str:
    """A ninja file that recompiles what changed: sources, the headers they include, or the command itself."""

    def path(name: Path | str) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    def shell(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    # By folder and name: two folders may well have files of the same name.
    objects = [str(source.relative_to(ROOT).with_suffix(".o")) for source in sources]
    lines = [
        "rule compile",
        f"  command = {shell(compile_command)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shell(link_command)} $in {shell(link_flags)} -o $out",
        *(f"build {path(out)}: compile {path(source)}" for out, source in zip(objects, sources, strict=True)),
        f"build {name}: link {' '.join(map(path, objects))}",
    ]
    return "\n".join(lines) + "\n"


def replace_if_changed(source: Path, target: Path) -> None:
    """Copy without ever touching the old file's bytes: a running process may have the library mapped."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.copy(source, fresh)
    os.replace(fresh, target)


class BuildLibrary(build_ext):
    """`build_ext` that makes a plain shared library, or explains why it did not."""

    def run(self) -> None:
        package = self.package_dir()
        package.mkdir(parents=True, exist_ok=True)
        work = ROOT / "build" / f"csrc-{sysconfig.get_platform()}"
        info: dict[str, str | None] = {"reason": None, "cuda_reason": None}
        for name, place, compile_one, key, warning in (
            (LIBRARY, work, compile_library, "reason", WARNING),
            (CUDA_LIBRARY, work / "cuda", compile_cuda_library, "cuda_reason", CUDA_WARNING),
        ):
            try:
                library, built_with = compile_one(place)
                replace_if_changed(library, package / name)
                info.update(built_with)
            except CannotBuildError as error:
                (package / name).unlink(missing_ok=True)  # a library of other sources is worse than none
                info[key] = str(error)
                if isinstance(error, NoCudaError) or (key != "reason" and str(error) == info["reason"]):
                    continue  # no news
                if os.environ.get("GRADE_KERNELS_REQUIRE_CSRC", "0") not in ("", "0"):
                    raise SystemExit(f"grade-kernels: {name} was not built: {error}") from error
                print(warning.format(reason=error), file=sys.stderr)
        work.mkdir(parents=True, exist_ok=True)
        (work / INFO).write_text(json.dumps(info, indent=2) + "\n")
        replace_if_changed(work / INFO, package / INFO)

    def package_dir(self) -> Path:
        return ROOT / "grade_kernels" if self.inplace else Path(self.build_lib) / "grade_kernels"

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join("grade_kernels", LIBRARY)

    def get_outputs(self) -> list[str]:
        made = [self.package_dir() / name for name in (LIBRARY, CUDA_LIBRARY, INFO)]
        return [] if self.inplace else [str(path) for path in made if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install finds the files in the source tree


class PythonAgnosticWheel(bdist_wheel):
    """A wheel for this platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


WARNING = """
******************************************************************************************************
WARNING: grade-kernels was installed WITHOUT its C++ backend. It works, on the slower `torch` backend.
Reason: {reason}
To get it: install torch >= 2.10 and a C++20 compiler (gcc >= 11 or clang >= 14), then install again
with pip's --force-reinstall --no-deps --no-cache-dir.
******************************************************************************************************
"""
CUDA_WARNING = """
WARNING: grade-kernels was installed without its CUDA C++ kernels; GPUs are served by the `triton` backend.
Reason: {reason}
"""

setup(
    ext_modules=[
        Extension(
            "grade_kernels._C",
            sources=[str(path.relative_to(ROOT)) for path in SOURCES],
            depends=[str(path.relative_to(ROOT)) for path in HEADERS],
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PythonAgnosticWheel},
)
