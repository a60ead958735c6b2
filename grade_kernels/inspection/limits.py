"""What generated code may cost: nothing spilled anywhere, no lanes that disagree about a sum, and no more instructions per
logit than were measured.
"""

from __future__ import annotations

from grade_kernels.backends.triton.targets import TRITON
from grade_kernels.inspection.configurations import Build
from grade_kernels.inspection.machine_code import Figures

__all__ = ["LIMITS", "violations"]

MEASURED_WITH = (3, 9)  # the version of Triton
OTHERS = 1.35  # times as much another version may take: up to 3.8, what is compiled for AMD is slower
# By target and "name dtype configuration": instructions per logit of the main loop and registers, as measured with
# Triton 3.9 (docs/kernels.md) and a twentieth more; at most 35 for sampling through a head on sm_90.
LIMITS: dict[str, dict[str, tuple[float, int]]] = {
    "sm_80": {
        "sample fp32 aligned": (30.2, 56),
        "sample+lse fp32 aligned": (36.6, 64),
        "softmax write fp32 aligned": (33.7, 48),
        "ste sums fp32 aligned": (36.1, 64),
        "ste apply fp32 aligned": (36.6, 72),
        "chunk sample fp32 32x32x4": (41.8, 64),
        "chunk scores fp32 32x32x4": (52.0, 64),
        "chunk softmax fp32 32x32x4": (32.5, 56),
        "head sample bf16 128x32+32x32x4x3": (37.7, 255),
        "head scores bf16 128x32+32x32x4x3": (48.2, 255),
        "head softmax bf16 128x32+32x32x4x3": (28.3, 255),
        "head softmax, ref bf16 128x32x32x4x3": (40.1, 255),
    },
    "sm_90": {
        "sample fp32 aligned": (28.9, 48),
        "sample+lse fp32 aligned": (35.2, 72),
        "softmax write fp32 aligned": (32.3, 48),
        "ste sums fp32 aligned": (35.4, 48),
        "ste apply fp32 aligned": (35.7, 72),
        "chunk sample fp32 32x64x4": (38.6, 64),
        "chunk scores fp32 32x64x4": (49.0, 80),
        "chunk softmax fp32 32x64x4": (30.6, 56),
        "head sample bf16 128x64x32x4x4": (35.0, 255),
        "head scores bf16 128x64x32x4x4": (47.0, 255),
        "head softmax bf16 128x64x32x4x4": (28.0, 255),
        "head softmax, ref bf16 128x32x32x4x4": (41.0, 255),
        "head sample bf16 128x256+64x32x8x3": (35.0, 255),
        "head scores bf16 128x256+64x32x8x3": (46.3, 255),
        "head softmax bf16 128x256+64x32x8x3": (28.7, 255),
    },
    "sm_100": {
        "sample fp32 aligned": (28.9, 64),
        "sample+lse fp32 aligned": (32.8, 72),
        "softmax write fp32 aligned": (32.3, 48),
        "ste sums fp32 aligned": (34.4, 48),
        "ste apply fp32 aligned": (35.6, 72),
        "chunk sample fp32 32x64x4": (37.5, 64),
        "chunk scores fp32 32x64x4": (48.5, 80),
        "chunk softmax fp32 32x64x4": (29.9, 56),
        "head sample bf16 128x64x32x4x4": (37.7, 248),
        "head scores bf16 128x64x32x4x4": (47.3, 248),
        "head softmax bf16 128x64x32x4x4": (29.8, 224),
        "head softmax, ref bf16 128x32x32x4x4": (44.2, 248),
    },
    "sm_120": {
        "sample fp32 aligned": (29.8, 64),
        "sample+lse fp32 aligned": (35.5, 72),
        "softmax write fp32 aligned": (32.4, 48),
        "ste sums fp32 aligned": (35.6, 56),
        "ste apply fp32 aligned": (35.8, 64),
        "head sample bf16 128x32+32x32x4x4": (39.2, 255),
        "head scores bf16 128x32+32x32x4x4": (48.5, 255),
        "head softmax bf16 128x32+32x32x4x4": (30.0, 255),
        "head softmax, ref bf16 128x32x32x4x4": (43.3, 255),
    },
    "gfx942": {
        "sample fp32 aligned": (33.4, 80),
        "sample+lse fp32 aligned": (37.5, 88),
        "softmax write fp32 aligned": (33.0, 72),
        "ste sums fp32 aligned": (35.4, 88),
        "ste apply fp32 aligned": (36.5, 88),
        "chunk sample fp32 32x64x1": (48.3, 128),
        "chunk scores fp32 32x64x1": (68.5, 185),
        "chunk softmax fp32 32x64x1": (46.0, 242),
        "head sample bf16 128x64x32x4x2": (59.9, 139),
        "head scores bf16 128x64x32x4x2": (77.6, 138),
        "head softmax bf16 128x64x32x4x2": (53.1, 160),
        "head softmax, ref bf16 128x32x32x4x4": (88.8, 144),
        "head softmax, ref bf16 128x64x32x4x2": (66.3, 222),
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
    if found.unequal:
        words.append(f"{label} for {found.target}: {found.unequal} sums in which lanes may disagree, 0 allowed")
    limit = LIMITS.get(found.target, {}).get(label)
    if limit is not None:
        slack = 1.0 if TRITON == MEASURED_WITH else OTHERS
        most, registers = round(slack * limit[0], 1), min(255, int(slack * limit[1]))
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
