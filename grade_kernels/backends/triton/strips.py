"""Rows of given logits in strips: what the kernels that scan them and their launchers agree on.

A strip is `LANES` neighbouring tokens, four in each thread of a program. A tile is `STRIPS` strips. A row is scanned tile by
tile, and cut into splits of `TILES` tiles, one program each, so that a few long rows fill a device. These sizes depend on
the vocabulary alone, so a row's result depends on neither the batch nor the device's size.

Four tokens whose *global* ids are neighbours share a Philox call, and strips are aligned to such groups. A vocabulary shard
may start inside a group. Then its strips start up to three columns before it: `SKEW` columns that do not exist.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.targets import INTERPRETED, TRITON, Target, compiler_options, current_target
from grade_kernels.dtypes import compute_dtype

NUM_WARPS = 4
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def strip_sizes(width: int, dtype: torch.dtype, warp_size: int, sizes: TritonSizes) -> dict[str, int]:
    """LANES, STRIPS, TILES and SPLITS for a row of `width` columns."""
    lanes = 4 * warp_size * NUM_WARPS if sizes.lanes is None else sizes.lanes
    # Strips are unrolled and share one step of the running maximum. float64 needs the registers for itself.
    most = 1 if dtype == torch.float64 else sizes.most_strips
    strips = min(most, triton.next_power_of_2(triton.cdiv(width, lanes)))
    tiles = triton.cdiv(sizes.row_split, lanes * strips)
    return {"LANES": lanes, "STRIPS": strips, "TILES": tiles, "SPLITS": triton.cdiv(width, lanes * strips * tiles)}


def strip_compiler_options(dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """Warps, and compiler options, of kernels over strips."""
    options = {"num_warps": NUM_WARPS, **compiler_options(target.backend)}
    if target.backend == "cuda" and dtype == torch.float64 and TRITON == (3, 8):
        options["maxnreg"] = 168  # else its ptxas makes room for another program, and spills for it
    return options


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether rows of these tensors can be read 16 bytes at a time, by the rule that Triton specialises kernels on."""
    return all(
        t.element_size() <= 4 and t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0
        for t in tensors
    )  # fmt: skip


def launch_options(sizes: TritonSizes, vocab_start: int, logits: torch.Tensor, *others: torch.Tensor) -> dict[str, Any]:
    """Arguments that all scanning kernels share, for the tensors of `logits`' shape that they read."""
    skew = vocab_start & 3
    target = current_target()
    return {
        "V": logits.shape[1],
        "group_start": (vocab_start >> 2) & 0xFFFFFFFF,
        "SKEW": skew,
        **strip_sizes(logits.shape[1] + skew, logits.dtype, target.warp_size, sizes),
        "DTYPE": TRITON_DTYPE[compute_dtype(logits.dtype)],
        "FAST": target.backend == "cuda",
        "ALIGNED": skew == 0 and is_aligned(logits, *others),
        **strip_compiler_options(logits.dtype, target),
    }


@triton.jit
def split_bounds(i_s, V, SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr):
    """In strips: where a split begins, where its whole tiles end, and where it ends.

    What is left of a row's last tile needs masks. It is taken strip by strip, which compiles to a fourth of the code.
    """
    lo = i_s * (TILES * STRIPS)
    hi = tl.minimum(lo + TILES * STRIPS, tl.cdiv(V + SKEW, LANES))
    # With a skew the first strip needs masks as well. Such shards are rare, so all of their strips are masked.
    full = lo if SKEW else tl.minimum(hi, V // (LANES * STRIPS) * STRIPS)
    return lo, full, hi


@triton.jit
def _load(p_row, s_v, o_v, V, OTHER: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Columns o_v of a row in the compute dtype."""
    p_v = p_row + o_v.to(tl.int64) * s_v
    if MASKED:
        b_x = tl.load(p_v, mask=(o_v >= 0) & (o_v < V), other=OTHER)
    else:
        b_x = tl.load(p_v)
    return b_x.to(DTYPE)


@triton.jit
def load_strip(
    p_row, s_v, first, V, OTHER: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """LANES columns of a row from `first` in the compute dtype; with MASKED, OTHER where there is no such column."""
    if ALIGNED:
        b_x = _load(p_row, s_v, first + tl.arange(0, LANES), V, OTHER, DTYPE, MASKED)  # [LANES]
    else:
        # Triton would give a row that cannot be read 16 bytes at a time another layout than the noise, and every strip
        # would go through shared memory. So the four tokens of each group are loaded apart: they stay in the thread.
        o_v = first + 4 * tl.arange(0, LANES // 4)
        b_0 = _load(p_row, s_v, o_v, V, OTHER, DTYPE, MASKED)  # [LANES / 4]
        b_1 = _load(p_row, s_v, o_v + 1, V, OTHER, DTYPE, MASKED)
        b_2 = _load(p_row, s_v, o_v + 2, V, OTHER, DTYPE, MASKED)
        b_3 = _load(p_row, s_v, o_v + 3, V, OTHER, DTYPE, MASKED)
        b_x = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [LANES])
    return b_x


@triton.jit
def round_to(b_x, DTYPE: tl.constexpr):
    """A block in a dtype, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter truncates where hardware rounds to nearest even.
        b_bits = b_x.to(tl.float32).to(tl.uint32, bitcast=True)
        b_x = ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_x.to(DTYPE)


@triton.jit
def store_strip(p_row, s_v, first, V, b_x, MASKED: tl.constexpr):
    """Write a strip to a row from column `first`, in the row's dtype."""
    o_v = first + tl.arange(0, b_x.shape[0])
    p_v = p_row + o_v.to(tl.int64) * s_v
    b_x = round_to(b_x, p_row.dtype.element_ty)
    if MASKED:
        tl.store(p_v, b_x, mask=(o_v >= 0) & (o_v < V))
    else:
        tl.store(p_v, b_x)


@triton.jit
def sum_splits_kernel(partial, total, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """A row's total from its splits'."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    p_total = total + i_n
    b_partial = tl.load(partial + i_n * SPLITS + o_s, mask=o_s < SPLITS, other=0.0)  # [BLOCK_S]
    tl.store(p_total, tl.sum(b_partial, 0))


def sum_splits(partial: torch.Tensor, total: torch.Tensor) -> None:
    """Sum `[N, splits]` into `[N]`, in an order that does not depend on N."""
    rows, splits = partial.shape
    sum_splits_kernel[(rows,)](
        partial=partial, total=total, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits), num_warps=1
    )
