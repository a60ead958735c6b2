"""Public figures of the devices that predictions are made for, and what fits on one of their multiprocessors."""

from __future__ import annotations

from typing import NamedTuple

from grade_kernels.inspection.machine_code import Figures

__all__ = ["DEVICES", "Device", "programs"]

# Lanes per clock and multiprocessor, by what shares a unit: a resource's time is the sum over its instructions of
# count / lanes. NVIDIA: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" (results per clock
# for compute capability 8.0, 9.0 and 10.0); four schedulers issue one warp instruction a clock each; 32 load/store
# units (architecture white papers). The wide multiply of Philox counts like any other integer multiply, which the guide
# leaves open. AMD: CDNA 3 ISA and white paper; four 16-lane vector units per compute unit, transcendental functions and
# 32-bit integer multiplies at a quarter of the rate, scalar and memory instructions issued beside them.
_ISSUE = dict.fromkeys(("fma", "multiply", "integer", "special", "memory", "tensor", "other"), 128.0)
_NVIDIA = {"multiply": {"multiply": 64.0}, "integer": {"integer": 64.0}, "special": {"special": 16.0},
           "load/store": {"memory": 32.0}, "issue": _ISSUE}  # fmt: skip
_AMPERE = {**_NVIDIA, "fma": {"fma": 64.0, "multiply": 64.0}}
_HOPPER = {**_NVIDIA, "fma": {"fma": 128.0, "multiply": 128.0}}
_CDNA3 = {
    "vector": {"fma": 64.0, "integer": 64.0, "multiply": 16.0, "special": 16.0},
    "load/store": {"memory": 64.0},
    "scalar": {"other": 64.0},
}


class Device(NamedTuple):
    """A device's peaks.

    Attributes:
        target: whose machine code it runs.
        multiprocessors, clock: their number, and hertz under load.
        bandwidth, cache_bandwidth: bytes per second from device memory, and from the L2 caches that feed tiles.
        tensor: dense bfloat16 operations per second (two for a multiply-add).
        wide: float32 operations per second outside of matrix units.
        pipes: lanes per clock and multiprocessor, by resource and pipe.
    """

    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    cache_bandwidth: float
    tensor: float
    wide: float
    pipes: dict[str, dict[str, float]]


# Multiprocessors, bandwidth and peaks: the vendors' data sheets of the SXM (OAM) modules, dense figures. The clock of
# H100, H200 and B200 is the one at which their stated tensor peak follows from their multiprocessors.
# Cache: A100's 5120 bytes per clock are NVIDIA's (A100 white paper). For later ones NVIDIA states nothing: ASSUMED are
# the same 5120 per clock for Hopper, and for B200 the 64 bytes per clock that each multiprocessor's port takes.
# MI300X: 2 KB per clock from the L2 of each of 8 dies (CDNA 3 white paper).
DEVICES = {
    "A100": Device("sm_80", 108, 1.41e9, 2.039e12, 5120 * 1.41e9, 312e12, 19.5e12, _AMPERE),
    "H100": Device("sm_90", 132, 1.83e9, 3.35e12, 5120 * 1.83e9, 989.4e12, 61.8e12, _HOPPER),
    "H200": Device("sm_90", 132, 1.83e9, 4.8e12, 5120 * 1.83e9, 989.4e12, 61.8e12, _HOPPER),
    "B200": Device("sm_100", 148, 1.85e9, 8.0e12, 148 * 64 * 1.85e9, 2250e12, 70.1e12, _HOPPER),
    "MI300X": Device("gfx942", 304, 2.1e9, 5.3e12, 8 * 2048 * 2.1e9, 1307.4e12, 163.4e12, _CDNA3),
}

# Bytes of shared memory per multiprocessor, and threads (CUDA C++ Programming Guide, "Technical Specifications").
_CUDA = {"sm_80": (164 * 1024, 2048), "sm_90": (228 * 1024, 2048), "sm_100": (228 * 1024, 2048),
         "sm_120": (100 * 1024, 1536)}  # fmt: skip


def programs(found: Figures) -> int:
    """How many programs of a kernel fit on a multiprocessor at a time, by registers, shared memory and threads."""
    if found.target not in _CUDA:
        # Per vector unit 512 registers for each lane in steps of 8, at most 8 waves; 64 KiB of LDS.
        waves = min(8, 512 // max(8, -(-found.registers // 8) * 8))
        return min(4 * waves // found.warps, 65536 // found.shared if found.shared else 32)
    shared, threads = _CUDA[found.target]
    # A quarter of a multiprocessor has 16384 registers, given to warps in steps of 256; each program reserves 1 KiB.
    warps = 4 * (16384 // max(256, -(-found.registers * 32 // 256) * 256))
    return min(warps // found.warps, shared // (found.shared + 1024), threads // (32 * found.warps), 32)
