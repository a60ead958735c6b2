"""What the steps run on, as JSON: `python -m benchmarks.gpu_check.machine cuda`. A process of its own asks torch for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.harness import ROOT, cpu_name

NO_GPU = 2  # exit status


def describe(device: str) -> dict[str, str]:
    """The device's name, what it is compiled for, and the versions that decide what runs on it."""
    if device == "cpu":
        name, target, memory = cpu_name(), "cpu", ""
    else:
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, f"{properties.total_memory / 2**30:.0f} GiB"
        amd = getattr(properties, "gcnArchName", "").partition(":")[0] if torch.version.hip else ""
        target = amd or f"sm_{properties.major}{properties.minor}"
    return {
        "device": name,
        "target": target,
        "memory": memory,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _driver(),
        "processor": cpu_name(),
        "commit": _commit(),
    }


def why_no_gpu() -> str | None:
    """None if torch can use a GPU; else what was looked for, and what was found instead."""
    if torch.cuda.is_available():
        return None
    built = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else ""
    )
    lines = [
        "no GPU was found that torch can use. Looked for:",
        f"  torch {torch.__version__}: built for {built or 'CPUs only: install a build for CUDA or ROCm (pytorch.org)'}",
        f"  devices that torch sees: {torch.cuda.device_count() if built else 0}",
    ]
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in os.environ:
            lines.append(f"  {name} is {os.environ[name]!r}")
    for tool in ("nvidia-smi", "rocminfo"):
        lines.append(f"  {tool}: {shutil.which(tool) or 'not there'}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _commit() -> str:
    changed = " with changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return _output("git", "rev-parse", "--short", "HEAD") + changed


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> int:
    device = sys.argv[1]
    reason = None if device == "cpu" else why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return NO_GPU
    print(json.dumps(describe(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
