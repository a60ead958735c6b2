"""How rows are cut up: what the kernels of this backend and their launchers agree on.

A row is scanned in tiles of `STRIPS` strips of `LANES` neighbouring tokens, and cut into splits of `TILES` tiles, one
program each, so that a few long rows fill a device. The sizes
depend on the vocabulary alone, so results depend on neither the batch nor
the device.

Strips are aligned to groups of four *global* token ids, which share a Philox call. A vocabulary shard that starts
inside such a group is shifted right by `skew` columns that do not exist.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from grade_kernels.dtypes import compute_dtype

NUM_WARPS = 4
MAX_STRIPS = 4
SPLIT_COLUMNS = 8192
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # fixed when the kernels are decorated, too
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def target() -> tuple[str, int]:
    """Name of the Triton backend that kernels are launched on, and the threads of a warp there."""
    if INTERPRETED:
        return "interpreter", 128  # NumPy's cost is per operation, so strips are wide
    active = triton.runtime.driver.active.get_current_target()
    return active.backend, active.warp_size


def strip_sizes(width: int, dtype: torch.dtype, warp_size: int) -> dict[str, int]:
    """LANES, STRIPS, TILES and SPLITS for a row of `width` columns."""
    lanes = 4 * warp_size * NUM_WARPS  # a thread holds the four tokens of one Philox call
    # Strips are unrolled and share one step of the running maximum. float64 needs the registers for itself.
    strips = 1 if dtype == torch.float64 else min(MAX_STRIPS, triton.next_power_of_2(triton.cdiv(width, lanes)))
    tiles = triton.cdiv(SPLIT_COLUMNS, lanes * strips)
    return {"LANES": lanes, "STRIPS": strips, "TILES": tiles, "SPLITS": triton.cdiv(width, lanes * strips * tiles)}


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether rows of these tensors can be read 16 bytes at a time, by the rule that Triton specialises kernels on."""
    return all(
        t.element_size() <= 4 and t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0
        for t in tensors
    )  # fmt: skip


def target_options(backend: str) -> dict[str, Any]:
    """Compiler options for a Triton backend."""
    if backend != "hip":
        return {}
    from triton.backends.amd.compiler import HIPOptions

    # AMD logarithms and exponentials otherwise spend four instructions on denormal numbers, as NVIDIA's do not.
    options: dict[str, Any] = {"allow_flush_denorm": True}
    if "llvm_fn_attrs" in HIPOptions.__dataclass_fields__:  # not in Triton's older versions
        options["llvm_fn_attrs"] = "amdgpu-unroll-threshold=2000"  # by default LLVM would leave Philox in a loop
    return options


def launch_options(vocab_start: int, logits: torch.Tensor, *others: torch.Tensor) -> dict[str, Any]:
    """Arguments that all scanning kernels share, for the tensors of `logits`' shape that they read."""
    skew = vocab_start & 3
    backend, warp_size = target()
    return {
        "V": logits.shape[1],
        "group_start": (vocab_start >> 2) & 0xFFFFFFFF,
        "SKEW": skew,
        **strip_sizes(logits.shape[1] + skew, logits.dtype, warp_size),
        "DTYPE": TRITON_DTYPE[compute_dtype(logits.dtype)],
        "FAST": backend == "cuda",
        "ALIGNED": skew == 0 and is_aligned(logits, *others),
        "num_warps": NUM_WARPS,
        **target_options(backend),
    }


def launching(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's device the current one, which is where Triton launches."""
    if tensor.device.type != "cpu":
        return getattr(torch, tensor.device.type).device(tensor.device)
    if INTERPRETED:
        import numpy as np

        return np.errstate(all="ignore")  # the interpreter is NumPy, which warns of the infinities that are meant
    return nullcontext()


@triton.jit
def split_bounds(i_s, V, SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr):
    """In strips: where a split begins, where its whole tiles end, and where it ends.

    What is left of a row's last tile needs masks. It is taken strip by strip: that is a fourth of the code.
    """
    lo = i_s * (TILES * STRIPS)
    hi = tl.minimum(lo + TILES * STRIPS, tl.cdiv(V + SKEW, LANES))
    # With a skew the first strip needs masks as well; shards that start there are rare enough to mask them all.
    full = lo if SKEW else tl.minimum(hi, V // (LANES * STRIPS) * STRIPS)
    return lo, full, hi


@triton.jit
def _load(p_row, s_v, o_v, V, OTHER: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    p = p_row + o_v.to(tl.int64) * s_v
    if MASKED:
        b = tl.load(p, mask=(o_v >= 0) & (o_v < V), other=OTHER)
    else:
        b = tl.load(p)
    return b.to(DTYPE)


@triton.jit
def load_strip(
    p_row, s_v, first, V, OTHER: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """LANES columns of a row from `first` in the compute dtype; with MASKED, OTHER where there is no such column."""
    if ALIGNED:
        b = _load(p_row, s_v, first + tl.arange(0, LANES), V, OTHER, DTYPE, MASKED)
    else:
        # Rows that cannot be read 16 bytes at a time would be given another layout than the noise, and every strip
        # would go through shared memory. Four loads by the groups of the noise stay in the thread.
        o_v = first + 4 * tl.arange(0, LANES // 4)
        b0 = _load(p_row, s_v, o_v, V, OTHER, DTYPE, MASKED)
        b1 = _load(p_row, s_v, o_v + 1, V, OTHER, DTYPE, MASKED)
        b2 = _load(p_row, s_v, o_v + 2, V, OTHER, DTYPE, MASKED)
        b3 = _load(p_row, s_v, o_v + 3, V, OTHER, DTYPE, MASKED)
        b = tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [LANES])
    return b


@triton.jit
def _round_to(b, DTYPE: tl.constexpr):
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter truncates where hardware rounds to nearest even.
        bits = b.to(tl.float32).to(tl.uint32, bitcast=True)
        b = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b.to(DTYPE)


@triton.jit
def store_strip(p_row, s_v, first, V, b, MASKED: tl.constexpr):
    """Write a strip to a row from column `first`, in the row's dtype."""
    o_v = first + tl.arange(0, b.shape[0])
    p = p_row + o_v.to(tl.int64) * s_v
    b = _round_to(b, p_row.dtype.element_ty)
    if MASKED:
        tl.store(p, b, mask=(o_v >= 0) & (o_v < V))
    else:
        tl.store(p, b)


@triton.jit
def _sum_splits_kernel(partial, total, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    tl.store(total + i_n, tl.sum(tl.load(partial + i_n * SPLITS + o_s, mask=o_s < SPLITS, other=0.0), 0))


def sum_splits(partial: torch.Tensor, total: torch.Tensor) -> None:
    """Sum `[N, splits]` into `[N]`, in an order that does not depend on N."""
    rows, splits = partial.shape
    _sum_splits_kernel[(rows,)](partial, total, splits, triton.next_power_of_2(splits), num_warps=1)
