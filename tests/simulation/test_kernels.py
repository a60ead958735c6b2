"""The package's kernels as they are compiled for sm_80, executed in the simulator of PTX (`tests.support.ptx`).

The checks are those that Triton's interpreter and the host meet: the same tests run in a process of their own, in which
Triton's driver is the simulator. There a kernel fails, too, if it reads what nobody wrote, touches memory beside its tensors,
races, or has threads that store different values to one address.

With `GRADE_KERNELS_SIMULATED_STATUS=<folder>` each compiler's run leaves `simulated-<compiler>-<version>.json` in the folder:
how many cases executed each kernel, and how many of them passed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.needs import needs
from tests.support.ptx import cuda_library

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROWS = ["tests/backends/test_row_kernels.py", "tests/backends/test_row_layouts.py"]
GATHERS = ["tests/simulation/test_broken.py", "tests/simulation/test_gathers.py"]
HEADS = ["tests/backends/triton/test_head.py", *GATHERS]
OTHER = os.environ.get("GRADE_KERNELS_OTHER_TRITON", "")
STATUS = os.environ.get("GRADE_KERNELS_SIMULATED_STATUS", "")
FEW = [
    "tests/backends/test_row_kernels.py::test_sample[triton-2053-4-torch.float32]",
    "tests/backends/test_row_layouts.py::test_every_place[triton-shape4]",
]


def simulate(selection: list[str], compiler: str, version: str, **environment: str) -> None:
    """Run tests in the simulator, and refuse a run in which one fails or none runs."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_INTERPRET"))}
    kept |= {
        "GRADE_KERNELS_SIMULATE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GRADE_KERNELS_SIMULATED_COMPILER": f"{compiler} {version}",
        **environment,
    }
    if STATUS and selection not in (FEW, GATHERS):
        kept["GRADE_KERNELS_SIMULATED_RECORD"] = str(Path(STATUS).resolve() / f"simulated-{compiler}-{version}.json")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *selection]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-2000:]


def test_a_few_kernels_of_triton() -> None:
    simulate(FEW, "triton", triton.__version__)


@pytest.mark.takes_long("a minute of compiling; the interpreter has tests of the same kernels")
def test_gathers_and_broken_kernels_of_triton() -> None:
    simulate(GATHERS, "triton", triton.__version__)


@needs("a quarter of an hour, and a folder for what is found in GRADE_KERNELS_SIMULATED_STATUS", STATUS)
@pytest.mark.takes_long("two minutes of compiling; the interpreter has the same tests")
def test_all_kernels_of_triton() -> None:
    simulate([*ROWS, *HEADS, "-k", "not cuda"], "triton", triton.__version__)


@needs("another Triton: its folder in GRADE_KERNELS_OTHER_TRITON", OTHER)
@pytest.mark.takes_long("two minutes of compiling")
def test_all_kernels_of_another_triton() -> None:
    """Such as the oldest that users have, installed by `pip install --no-deps --target`."""
    path = f"{Path(OTHER).resolve()}{os.pathsep}{ROOT}"
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    environment = {**os.environ, "PYTHONPATH": path}
    version = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert version != triton.__version__
    simulate([*ROWS, *HEADS, "-k", "not cuda"], "triton", version, PYTHONPATH=path)


@needs("nvcc", cuda_library.why_unavailable() is None)
@pytest.mark.takes_long("half a minute of nvcc; on the host the same tests run")
def test_all_kernels_of_nvcc() -> None:
    simulate([*ROWS, "-k", "cuda"], "nvcc", cuda_library.nvcc_version())
