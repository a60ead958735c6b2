"""`softmax`: the relaxed sample `exp((l + g - max) / tau)`, its sum per row, and optionally its quotient; `relax`: with max.

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
from grade_kernels.backends.triton.philox import REFINE_BELOW, SHIFT, row_stream, strip_noise
from grade_kernels.backends.triton.scores import rate_of, score, weighted_sum
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
            b_w = tl.exp2((score(b_n, b_l[i_r]) - r_pivot) * r_rate)
            b_sum += b_w
            if WRITE:
                store_strip(p_w, s_wv, first, V, b_w * r_factor, MASKED)
    return b_sum, b_low


@triton.jit
def _gather(
    p_l, s_lv, V, group_start, stream, r_rate, strip_lo, strip_hi, state, LOWEST: tl.constexpr,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Fold some strips into the lanes' state: best score, sum of weights that count from it, least word."""
    b_best, b_sum, b_low = state
    o_group = (group_start + tl.arange(0, LANES // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
    for i_t in range(strip_lo, strip_hi, STRIPS):
        b_l = ()
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_l = b_l + (load_strip(p_l, s_lv, first, V, float("-inf"), LANES, DTYPE, ALIGNED, MASKED),)  # [LANES]
        b_s = ()
        b_top = b_best
        for i_r in tl.static_range(STRIPS):
            b_group = (o_group + (i_t + i_r) * (LANES // 4)).to(tl.uint32, bitcast=True)
            b_n, b_least = strip_noise(b_group, stream, DTYPE, FAST, REFINE)
            b_low = tl.minimum(b_low, b_least)
            b_s = b_s + (score(b_n, b_l[i_r]),)
            # A plain maximum would drop NaN, by which a bad row is known.
            b_top = tl.maximum(b_top, b_s[i_r], propagate_nan=tl.PropagateNan.ALL)
        # A lane that has seen only -inf would compute inf - inf. So it counts from a finite number.
        b_pivot = tl.maximum(b_top, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        b_sum *= tl.exp2((b_best - b_pivot) * r_rate)
        for i_r in tl.static_range(STRIPS):
            b_sum += tl.exp2((b_s[i_r] - b_pivot) * r_rate)
        b_best = b_top
    return b_best, b_sum, b_low


@triton.jit(do_not_specialize=["group_start"])
def relax_scan_kernel(
    logits, tau, seed, row_ids, best, partial, s_ln, s_lv, s_tau, V, group_start, LOWEST: tl.constexpr,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One split of one row: its best score and the sum of weights that count from it, each `[N, SPLITS]`."""
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // SPLITS, (i_p % SPLITS).to(tl.int32)
    stream = row_stream(seed, row_ids, i_n)
    group_start = group_start.to(tl.uint32)
    p_l = logits + i_n * s_ln
    r_rate = rate_of(tl.load(tau + i_n * s_tau))
    lo, full, hi = split_bounds(i_s, V, SKEW, LANES, STRIPS, TILES)
    fresh = (
        tl.full((LANES,), float("-inf"), DTYPE), tl.zeros((LANES,), DTYPE), tl.full((LANES // 4,), 0xFFFFFFFF, tl.uint32)
    )  # fmt: skip
    state = _gather(
        p_l, s_lv, V, group_start, stream, r_rate, strip_lo=lo, strip_hi=full, state=fresh, LOWEST=LOWEST, SKEW=SKEW,
        LANES=LANES, STRIPS=STRIPS, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, MASKED=False, REFINE=False,
    )  # fmt: skip
    state = _gather(
        p_l, s_lv, V, group_start, stream, r_rate, strip_lo=full, strip_hi=hi, state=state, LOWEST=LOWEST, SKEW=SKEW,
        LANES=LANES, STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, MASKED=True, REFINE=False,
    )  # fmt: skip
    if tl.min(state[2].to(tl.int64), 0) < REFINE_BELOW:
        # One split in two thousand holds such a word. It is scanned again; the others pay one minimum per word.
        state = _gather(
            p_l, s_lv, V, group_start, stream, r_rate, strip_lo=lo, strip_hi=hi, state=fresh, LOWEST=LOWEST, SKEW=SKEW,
            LANES=LANES, STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, MASKED=True, REFINE=True,
        )  # fmt: skip
    b_best, b_sum, _ = state
    r_best = tl.max(b_best, 0)
    b_pivot = tl.maximum(b_best, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(best + i_p, r_best)
    # In a split that holds NaN or +inf the sum is NaN.
    b_scale = tl.exp2((b_pivot - tl.maximum(r_best, LOWEST)) * r_rate)
    tl.store(partial + i_p, weighted_sum(b_sum, b_scale, 0))


@triton.jit(do_not_specialize=["group_start"])
def softmax_kernel(
    logits, weights, tau, seed, row_ids, score_max, best, partial, total, s_ln, s_lv, s_wn, s_wv, s_tau, V, group_start,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
    LOWEST: tl.constexpr = None,
):  # fmt: skip
    """One split of one row.

    Without `total`, the split's sum goes to `partial` `[N, SPLITS]`, and the weights to `weights` unless it is None.
    With `total`, `partial` is read, and the weights are written divided by the row's sum, which goes to `total`.
    With `best` as well, both are what `relax_scan_kernel` left, and the best score goes to `score_max`.
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
    r_rate = rate_of(tl.load(tau + i_n * s_tau))
    o_s = tl.arange(0, BLOCK_S)
    if best is None:
        r_pivot = tl.load(score_max + i_n) - SHIFT
    else:
        b_best = tl.load(best + i_n * SPLITS + o_s, mask=o_s < SPLITS, other=float("-inf"))  # [BLOCK_S]
        r_pivot = tl.max(b_best, 0)
    r_factor = tl.full((), 1.0, DTYPE)
    if total is not None:
        b_partial = tl.load(partial + i_n * SPLITS + o_s, mask=o_s < SPLITS, other=0.0)  # [BLOCK_S]
        if best is None:
            r_total = tl.sum(b_partial, 0)
        else:
            b_scale = tl.exp2((tl.maximum(b_best, LOWEST) - tl.maximum(r_pivot, LOWEST)) * r_rate)
            r_total = weighted_sum(b_partial, b_scale, 0)
            nan = tl.full((), float("nan"), DTYPE)
            r_total = tl.where(r_pivot == float("-inf"), nan, r_total)
            tl.store(score_max + i_n, tl.where(r_total != r_total, nan, r_pivot + SHIFT), mask=i_s == 0)
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
        "score_max": score_max.contiguous(), "best": None, "partial": partial,
        "BLOCK_S": triton.next_power_of_2(splits), **options,
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


def relax(rows: Rows, out: torch.Tensor, sizes: TritonSizes) -> torch.Tensor:
    """`Backend.gumbel_softmax` without hard."""
    logits, (_, tau, noise) = flat(rows.logits), rows
    count, device = len(logits), logits.device
    score_max, total = torch.empty(2, count, dtype=tau.dtype, device=device)
    options = launch_options(sizes, noise.vocab_start, logits)
    splits = options["SPLITS"]
    best, partial = torch.empty(2, count, splits, dtype=tau.dtype, device=device)
    shared = {
        "logits": logits, "s_ln": logits.stride(0), "s_lv": logits.stride(1), "tau": tau, "s_tau": tau.stride(0),
        "seed": seed_on(noise.seed, device), "row_ids": contiguous(noise.row_ids), "best": best, "partial": partial,
        "LOWEST": torch.finfo(tau.dtype).min, **options,
    }  # fmt: skip
    with launching(logits), written_flat(out) as weights:
        relax_scan_kernel[(count * splits,)](**shared)
        softmax_kernel[(count * splits,)](
            **shared, weights=weights, s_wn=weights.stride(0), s_wv=weights.stride(1), score_max=score_max, total=total,
            BLOCK_S=triton.next_power_of_2(splits),
        )  # fmt: skip
    return score_max
