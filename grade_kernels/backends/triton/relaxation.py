"""`softmax`: the relaxed sample `exp((l + g - max) / tau)`, its sum per row, and optionally its quotient.

Normalising takes two passes that both regenerate the noise. Writing the weights first and scaling them afterwards would
move more memory than the second pass computes, and would round narrow dtypes twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.layouts import flat, written_flat
from grade_kernels.backends.native import contiguous
from grade_kernels.backends.records import Rows
from grade_kernels.backends.triton.philox import LN2, LOG2E, REFINE_BELOW, SHIFT, row_stream, strip_noise
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.strips import launch_options, load_strip, split_bounds, store_strip, sum_splits
from grade_kernels.backends.triton.targets import launching
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import seed_on


@triton.jit
def _weigh(
    p_l, p_w, s_lv, s_wv, V, group_start, stream, r_pivot, r_rate, r_factor, strip_lo, strip_hi, state,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr, WRITE: tl.constexpr, MASKED: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Weights of some strips: written times r_factor (WRITE), and folded into the lanes' state (sum, least word)."""
    b_sum, b_low = state
    o_group = (group_start + tl.arange(0, LANES // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
    for i_t in range(strip_lo, strip_hi, STRIPS):
        b_l = ()
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_l = b_l + (load_strip(p_l, s_lv, first, V, float("-inf"), LANES, DTYPE, ALIGNED, MASKED),)  # [LANES]
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_group = (o_group + (i_t + i_r) * (LANES // 4)).to(tl.uint32, bitcast=True)
            b_n, b_least = strip_noise(b_group, stream, DTYPE, FAST, REFINE)
            b_low = tl.minimum(b_low, b_least)
            # Scaled scores could overflow, and their difference would cancel more digits. So the difference comes first.
            b_w = tl.exp2((tl.fma(b_n, -LN2, b_l[i_r]) - r_pivot) * r_rate)
            b_sum += b_w
            if WRITE:
                store_strip(p_w, s_wv, first, V, b_w * r_factor, MASKED)
    return b_sum, b_low


@triton.jit(do_not_specialize=["group_start"])
def softmax_kernel(
    logits, weights, tau, seed, row_ids, score_max, partial, total, s_ln, s_lv, s_wn, s_wv, s_tau, V, group_start,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One split of one row.

    Without `total`, the split's sum goes to `partial` `[N, SPLITS]`, and the weights to `weights` unless it is None.
    With `total`, `partial` is read, and the weights are written divided by the row's sum, which goes to `total`.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // SPLITS, (i_p % SPLITS).to(tl.int32)
    WRITE: tl.constexpr = weights is not None
    stream = row_stream(seed, row_ids, i_n)
    group_start = group_start.to(tl.uint32)
    p_l = logits + i_n * s_ln
    p_w = weights
    if WRITE:
        p_w = weights + i_n * s_wn
    r_pivot = tl.load(score_max + i_n) - SHIFT
    r_rate = LOG2E / tl.load(tau + i_n * s_tau)
    r_factor = tl.full((), 1.0, DTYPE)
    if total is not None:
        o_s = tl.arange(0, BLOCK_S)
        b_partial = tl.load(partial + i_n * SPLITS + o_s, mask=o_s < SPLITS, other=0.0)  # [BLOCK_S]
        r_total = tl.sum(b_partial, 0)
        r_factor = 1.0 / r_total
        tl.store(total + i_n, r_total, mask=i_s == 0)
    lo, full, hi = split_bounds(i_s, V, SKEW, LANES, STRIPS, TILES)
    fresh = (tl.zeros((LANES,), DTYPE), tl.full((LANES // 4,), 0xFFFFFFFF, tl.uint32))
    state = _weigh(
        p_l, p_w, s_lv, s_wv, V, group_start, stream, r_pivot, r_rate, r_factor, strip_lo=lo, strip_hi=full, state=fresh,
        SKEW=SKEW, LANES=LANES, STRIPS=STRIPS, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, WRITE=WRITE, MASKED=False,
        REFINE=False,
    )  # fmt: skip
    state = _weigh(
        p_l, p_w, s_lv, s_wv, V, group_start, stream, r_pivot, r_rate, r_factor, strip_lo=full, strip_hi=hi, state=state,
        SKEW=SKEW, LANES=LANES, STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, WRITE=WRITE, MASKED=True,
        REFINE=False,
    )  # fmt: skip
    if tl.min(state[1].to(tl.int64), 0) < REFINE_BELOW:
        # One split in two thousand holds such a word. It is done again; the others pay one minimum per word.
        tl.debug_barrier()  # the same addresses are written again, maybe by other threads
        state = _weigh(
            p_l, p_w, s_lv, s_wv, V, group_start, stream, r_pivot, r_rate, r_factor, strip_lo=lo, strip_hi=hi,
            state=fresh, SKEW=SKEW, LANES=LANES, STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, WRITE=WRITE,
            MASKED=True, REFINE=True,
        )  # fmt: skip
    if total is None:
        tl.store(partial + i_p, tl.sum(state[0], 0))


def softmax(
    rows: Rows,
    score_max: torch.Tensor,
    *,
    normalize: bool,
    dtype: torch.dtype,
    out: torch.Tensor | None,
    sizes: TritonSizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Backend.softmax`."""
    logits, (_, tau, noise) = flat(rows.logits), rows
    count, device = len(logits), logits.device
    compute = compute_dtype(logits.dtype)
    out = torch.empty(rows.logits.shape, dtype=dtype, device=device) if out is None else out
    total = torch.empty(count, dtype=compute, device=device)
    if count == 0:
        return out, total
    options = launch_options(sizes, noise.vocab_start, logits)
    splits = options["SPLITS"]
    partial = torch.empty(count, splits, dtype=compute, device=device)
    shared = {
        "logits": logits, "s_ln": logits.stride(0), "s_lv": logits.stride(1), "s_wn": logits.shape[1], "s_wv": 1,
        "tau": tau, "s_tau": tau.stride(0), "seed": seed_on(noise.seed, device), "row_ids": contiguous(noise.row_ids),
        "score_max": score_max.contiguous(), "partial": partial, "BLOCK_S": triton.next_power_of_2(splits), **options,
    }  # fmt: skip
    launch = softmax_kernel[(count * splits,)]
    with launching(logits), written_flat(out) as weights:
        if normalize:
            launch(weights=None, total=None, **shared)
            launch(weights=weights, total=total, **shared)
        else:
            launch(weights=weights, total=None, **shared)
            sum_splits(partial, total)
    return out, total
