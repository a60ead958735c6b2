"""What generated code may cost: nothing spilled anywhere, and no more instructions per logit than were measured."""

from __future__ import annotations

from grade_kernels.inspection.configurations import Build
from grade_kernels.inspection.machine_code import Figures

__all__ = ["LIMITS", "violations"]

# By target and "name dtype configuration": instructions per logit of the main loop and registers, as measured with
# Triton 3.9 (docs/kernels.md) and a twentieth more.
LIMITS: dict[str, dict[str, tuple[float, int]]] = {
    "sm_90": {
        "sample fp32 aligned": (28.9, 48),
    },
}


def violations(build: Build, found: Figures) -> list[str]:
    """What a kernel does worse than it may, in words; the baseline may do anything."""
    if is_baseline(build):
        return []
    label = f"{found.kernel} {found.dtype} {found.configuration}"
    words = []
    if found.stack or found.spills:
        words.append(f"{label} for {found.target}: {found.stack} bytes of stack and {found.spills} spills, 0 allowed")
    limit = LIMITS.get(found.target, {}).get(label)
    if limit is not None:
        most, registers = limit
        if found.total is None:
            words.append(f"{label} for {found.target}: no main loop was found")
        elif found.total > most:
            words.append(f"{label} for {found.target}: {found.total:.1f} instructions per logit, {most} allowed")
        if found.registers > registers:
            words.append(f"{label} for {found.target}: {found.registers} registers, {registers} allowed")
    return words


def is_baseline(build: Build) -> bool:
    """Whether a kernel is there for comparison only."""
    return build.name.startswith("baseline")
