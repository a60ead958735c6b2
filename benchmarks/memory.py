"""Peak memory of one call, in a process of its own, beyond inputs: the resident set's, or the device allocator's."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, Case, Contestants

FULL = "out of memory"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start(build: Callable[[Case], Contestants], case: Case, name: str) -> subprocess.Popen[str]:
    """Start measuring one contestant; `finish` gives the bytes. Other processes do not disturb it."""
    request = {"module": build.__module__, "build": build.__name__, "case": asdict(case), "name": name}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(request | {"threads": torch.get_num_threads()})],
        cwd=ROOT,
        # A fixed threshold (glibc moves its own): large blocks go back to the system as soon as they are freed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> int | None:
    """Wait for a measurement; returns bytes, or None where the device's memory did not suffice."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"measuring memory failed with status {process.returncode}: {' '.join(process.args)}")
    last = output.splitlines()[-1]
    return None if last == FULL else int(last)


def measure(build: Callable[[Case], Contestants], case: Case, name: str) -> int:
    """Bytes by which memory exceeds, at its peak, that before one call; for a fresh process.

    A call on the same inputs goes before, for compilation and for what libraries set up once and keep (threads, MKL's
    packing buffers); so this is what a step of a loop takes.
    """
    work = build(case)[name]
    work()
    return of_call(work, case.device)


def of_call(work: Callable[[], Any], device: str) -> int:
    """The same in this process, for work that has been called before. On a CPU other work's freed memory may hide some."""
    gc.collect()
    before = mark(device)
    result = work()
    most = peak(device)
    del result
    return most - before


def mark(device: str) -> int:
    """Bytes in use: of the device's allocator, or of this process. The high-water mark starts again from here."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    trim()
    before = _resident()
    if os.access(CLEAR, os.W_OK):
        CLEAR.write_text("5")
    return before


def peak(device: str) -> int:
    """The most bytes that were in use since `mark`."""
    return _high_water() if device == "cpu" else torch.cuda.max_memory_allocated(device)


def _resident() -> int:
    return from_status("VmRSS") if STATUS.exists() else _high_water()


def _high_water() -> int:
    """Where the mark cannot be reset, this includes the start of the process: an upper bound."""
    if STATUS.exists():
        return from_status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim() -> None:
    """Give what was freed back to the system, as far as the allocator can."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def from_status(name: str) -> int:
    """A size that Linux tells of this process, in bytes: VmRSS is what it holds, VmHWM the most it held."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    build = getattr(importlib.import_module(request["module"]), request["build"])
    try:
        print(measure(build, Case(**request["case"]), request["name"]))
    except torch.OutOfMemoryError:
        print(FULL)


if __name__ == "__main__":
    main()
