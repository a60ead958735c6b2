"""`softmax_backward`: the gradient of the logits for every estimator, and of tau, given the gradient of the relaxation.

Two passes over the logits and the incoming gradient, one program per row and split in each. The first leaves the sums
that the softmax's Jacobian needs, `[4, N, SPLITS]`; the second reads its row's in a fixed order and writes the result,
which may take the place of the incoming gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.native import contiguous
from grade_kernels.backends.records import Noise, Sample
from grade_kernels.backends.triton.philox import LN2, LOG2E, REFINE_BELOW, SHIFT, load_key, split_row, strip_noise
from grade_kernels.backends.triton.tiles import (
    launch_options,
    launching,
    load_strip,
    split_bounds,
    store_strip,
    sum_splits,
)
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import seed_on


@triton.jit
def _sums(
    p_l, p_dy, s_lv, s_dyv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, strip_lo, strip_hi, state,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr, NOISY: tl.constexpr, REINMAX: tl.constexpr, MASKED: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Fold strips into the lanes' state: sums of w, w * dy and, untempered, exp(l - max) * dy; least word."""
    b_total, b_dot, b_plain, b_low = state
    o_group = (group_start + tl.arange(0, LANES // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
    for i_t in range(strip_lo, strip_hi, STRIPS):
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_l = load_strip(p_l, s_lv, first, V, float("-inf"), LANES, DTYPE, ALIGNED, MASKED)
            b_dy = load_strip(p_dy, s_dyv, first, V, 0.0, LANES, DTYPE, ALIGNED, MASKED)
            b_dy = tl.where(b_l == float("-inf"), 0.0, b_dy)  # a masked token's may be infinite
            b_s = b_l
            if NOISY:
                groups = (o_group + (i_t + i_r) * (LANES // 4)).to(tl.uint32, bitcast=True)
                b_n, b_least = strip_noise(groups, row_lo, row_hi, k0, k1, DTYPE, FAST, REFINE)
                b_low = tl.minimum(b_low, b_least)
                b_s = tl.fma(b_n, -LN2, b_l)
            b_w = tl.exp2((b_s - pivot) * rate)
            b_total += b_w
            b_dot = tl.fma(b_w, b_dy, b_dot)
            if REINMAX:
                b_plain = tl.fma(tl.exp2((b_l - pivot) * LOG2E), b_dy, b_plain)
    return b_total, b_dot, b_plain, b_low


@triton.jit(do_not_specialize=["N", "group_start"])
def softmax_backward_sums_kernel(
    dy, logits, tau, seed, row_ids, pivots, ids, partial, s_dyn, s_dyv, s_ln, s_lv, s_tau, N, V, group_start,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr, NOISY: tl.constexpr,
    REINMAX: tl.constexpr,
):  # fmt: skip
    """One split of one row into `partial` `[4, N, SPLITS]`.

    Its four planes: sum of w, sum of w * dy, then for reinmax the sum of exp(l - max) * dy and dy of the token, else
    whether the noise needs refinement.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // SPLITS, (i_p % SPLITS).to(tl.int32)
    k0, k1 = load_key(seed)
    row_lo, row_hi = split_row(i_n if row_ids is None else tl.load(row_ids + i_n))
    group_start = group_start.to(tl.uint32)
    p_l = logits + i_n * s_ln
    p_dy = dy + i_n * s_dyn
    pivot = tl.load(pivots + i_n)
    if NOISY:
        pivot -= SHIFT
    rate = LOG2E / tl.load(tau + i_n * s_tau)
    lo, full, hi = split_bounds(i_s, V, SKEW, LANES, STRIPS, TILES)
    zeros = tl.zeros((LANES,), DTYPE)
    fresh = (zeros, zeros, zeros, tl.full((LANES // 4,), 0xFFFFFFFF, tl.uint32))
    state = _sums(
        p_l, p_dy, s_lv, s_dyv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, lo, full, fresh,
        SKEW, LANES, STRIPS, DTYPE, FAST, ALIGNED, NOISY, REINMAX, MASKED=False, REFINE=False,
    )  # fmt: skip
    state = _sums(
        p_l, p_dy, s_lv, s_dyv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, full, hi, state,
        SKEW, LANES, 1, DTYPE, FAST, ALIGNED, NOISY, REINMAX, MASKED=True, REFINE=False,
    )  # fmt: skip
    plane = N.to(tl.int64) * SPLITS
    if NOISY:
        is_fine = tl.min(state[3].to(tl.int64), 0) < REFINE_BELOW
        tl.store(partial + 2 * plane + i_p, is_fine.to(DTYPE))
        if is_fine:
            # One split in two thousand holds such a word. It is done again; the others pay one minimum per word.
            state = _sums(
                p_l, p_dy, s_lv, s_dyv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, lo, hi, fresh,
                SKEW, LANES, 1, DTYPE, FAST, ALIGNED, NOISY, REINMAX, MASKED=True, REFINE=True,
            )  # fmt: skip
    tl.store(partial + i_p, tl.sum(state[0], 0))
    tl.store(partial + plane + i_p, tl.sum(state[1], 0))
    if REINMAX:
        tl.store(partial + 2 * plane + i_p, tl.sum(state[2], 0))
        # Read before the second pass may overwrite it.
        tl.store(partial + 3 * plane + i_p, tl.load(p_dy + tl.load(ids + i_n) * s_dyv).to(DTYPE))


@triton.jit
def _apply(
    p_l, p_dy, p_out, s_lv, s_dyv, s_outv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, i_id, dot, factor,
    plain_dot, plain_factor, top, dlogprob, strip_lo, strip_hi, b_dtau,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr, NOISY: tl.constexpr, REINMAX: tl.constexpr, LOGPROB: tl.constexpr, DTAU: tl.constexpr,
    MASKED: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of some strips, and fold its product with the scores' distance from the best into b_dtau."""
    o_group = (group_start + tl.arange(0, LANES // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
    for i_t in range(strip_lo, strip_hi, STRIPS):
        # All loads come first: out may be dy, so none could move above a store.
        strips_l = ()
        strips_dy = ()
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            strips_l = strips_l + (load_strip(p_l, s_lv, first, V, float("-inf"), LANES, DTYPE, ALIGNED, MASKED),)
            strips_dy = strips_dy + (load_strip(p_dy, s_dyv, first, V, 0.0, LANES, DTYPE, ALIGNED, MASKED),)
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_l = strips_l[i_r]
            b_s = b_l
            if NOISY:
                groups = (o_group + (i_t + i_r) * (LANES // 4)).to(tl.uint32, bitcast=True)
                b_n, _ = strip_noise(groups, row_lo, row_hi, k0, k1, DTYPE, FAST, REFINE)
                b_s = tl.fma(b_n, -LN2, b_l)
            b_s -= pivot
            b_w = tl.exp2(b_s * rate) * factor
            if REINMAX or LOGPROB:
                b_hit = (first + tl.arange(0, LANES) == i_id).to(DTYPE)
                b_p = tl.exp2((b_l - top) * LOG2E) * plain_factor
            if REINMAX:
                # 2 J((D + w) / 2) dy - J(p) dy / 2
                b_dl = (b_w + b_hit) * (strips_dy[i_r] - dot) - 0.5 * b_p * (strips_dy[i_r] - plain_dot)
            else:
                b_dl = b_w * (strips_dy[i_r] - dot)
            m_v = b_l == float("-inf")
            if DTAU:
                b_dtau += tl.where(b_s == float("-inf"), 0.0, b_dl * b_s)  # masked, or as good as
            if LOGPROB:
                b_dl += dlogprob * (b_hit - b_p)
            # Exactly zero for a masked token whatever its dy is, unless the row has no distribution at all.
            b_dl = tl.where(m_v, pivot * 0.0, b_dl)
            store_strip(p_out, s_outv, first, V, b_dl, MASKED)
    return b_dtau


@triton.jit(do_not_specialize=["N", "group_start"])
def softmax_backward_apply_kernel(
    dy, logits, tau, seed, row_ids, pivots, ids, logit_max, logit_sum, dlogprobs, partial, partial_dtau, out,
    s_dyn, s_dyv, s_ln, s_lv, s_outn, s_outv, s_tau, N, V, group_start,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr, NOISY: tl.constexpr,
    REINMAX: tl.constexpr,
):  # fmt: skip
    """One split of one row of the gradient, and of dtau (`partial_dtau` `[N, SPLITS]`) unless that is None."""
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // SPLITS, (i_p % SPLITS).to(tl.int32)
    LOGPROB: tl.constexpr = dlogprobs is not None
    DTAU: tl.constexpr = partial_dtau is not None
    k0, k1 = load_key(seed)
    row_lo, row_hi = split_row(i_n if row_ids is None else tl.load(row_ids + i_n))
    group_start = group_start.to(tl.uint32)
    p_l = logits + i_n * s_ln
    p_dy = dy + i_n * s_dyn
    p_out = out + i_n * s_outn
    pivot = tl.load(pivots + i_n)
    if NOISY:
        pivot -= SHIFT
    m_tau = tl.load(tau + i_n * s_tau)
    rate = LOG2E / m_tau

    plane = N.to(tl.int64) * SPLITS
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < SPLITS
    p_partial = partial + i_n * SPLITS + o_s
    m_total = tl.sum(tl.load(p_partial, mask=m_s, other=0.0), 0)
    dot = tl.sum(tl.load(p_partial + plane, mask=m_s, other=0.0), 0) / m_total
    factor = 1.0 / m_total
    plain_dot = dot
    plain_factor = factor
    top = pivot
    dlogprob = pivot
    i_id = 0
    if REINMAX or LOGPROB:
        i_id = tl.load(ids + i_n).to(tl.int32)
        top = tl.load(logit_max + i_n)
        plain_factor = 1.0 / tl.load(logit_sum + i_n)
    if LOGPROB:
        dlogprob = tl.load(dlogprobs + i_n)
    if REINMAX:
        plain_dot = tl.sum(tl.load(p_partial + 2 * plane, mask=m_s, other=0.0), 0) * plain_factor
        dot = 0.5 * (dot + tl.load(partial + 3 * plane + i_p))
    else:
        factor = factor / m_tau

    lo, full, hi = split_bounds(i_s, V, SKEW, LANES, STRIPS, TILES)
    b_dtau = tl.zeros((LANES,), DTYPE)
    is_fine = False
    if NOISY:
        is_fine = tl.load(partial + 2 * plane + i_p) > 0
    if is_fine:
        b_dtau = _apply(
            p_l, p_dy, p_out, s_lv, s_dyv, s_outv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, i_id, dot,
            factor, plain_dot, plain_factor, top, dlogprob, lo, hi, b_dtau, SKEW, LANES, 1, DTYPE, FAST, ALIGNED,
            NOISY, REINMAX, LOGPROB, DTAU, MASKED=True, REFINE=True,
        )  # fmt: skip
    else:
        b_dtau = _apply(
            p_l, p_dy, p_out, s_lv, s_dyv, s_outv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, i_id, dot,
            factor, plain_dot, plain_factor, top, dlogprob, lo, full, b_dtau, SKEW, LANES, STRIPS, DTYPE, FAST, ALIGNED,
            NOISY, REINMAX, LOGPROB, DTAU, MASKED=False, REFINE=False,
        )  # fmt: skip
        b_dtau = _apply(
            p_l, p_dy, p_out, s_lv, s_dyv, s_outv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, i_id, dot,
            factor, plain_dot, plain_factor, top, dlogprob, full, hi, b_dtau, SKEW, LANES, 1, DTYPE, FAST, ALIGNED,
            NOISY, REINMAX, LOGPROB, DTAU, MASKED=True, REFINE=False,
        )  # fmt: skip
    if DTAU:
        tl.store(partial_dtau + i_p, -tl.sum(b_dtau, 0) / m_tau)


def softmax_backward(
    dy: torch.Tensor,
    logits: torch.Tensor,
    tau: torch.Tensor,
    noise: Noise,
    sample: Sample,
    *,
    estimator: str,
    dlogprobs: torch.Tensor | None,
    needs_dtau: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """`Backend.softmax_backward`."""
    rows = logits.shape[0]
    dtype, device = compute_dtype(logits.dtype), logits.device
    noisy, reinmax = estimator in ("ste", "soft"), estimator == "reinmax"
    needs_dtau = needs_dtau and not reinmax
    dtau = (torch.empty if needs_dtau else torch.zeros)(rows, dtype=dtype, device=device)
    if rows == 0:
        return dtau
    options = launch_options(noise.vocab_start, logits, dy)
    options.update(N=rows, NOISY=noisy, REINMAX=reinmax)
    splits = options["SPLITS"]
    partial = torch.empty(4, rows, splits, dtype=dtype, device=device)
    partial_dtau = torch.empty(rows, splits, dtype=dtype, device=device) if needs_dtau else None
    seed, row_ids = seed_on(noise.seed, device), contiguous(noise.row_ids)
    pivots = (sample.score_max if noisy else sample.logit_max).contiguous()
    ids, logit_max, logit_sum = (part.contiguous() for part in (sample.ids, sample.logit_max, sample.logit_sum))
    dlogprobs = contiguous(dlogprobs)
    with launching(logits):
        softmax_backward_sums_kernel[(rows * splits,)](
            dy, logits, tau, seed, row_ids, pivots, ids, partial, *dy.stride(), *logits.stride(), tau.stride(0),
            **options,
        )  # fmt: skip
        softmax_backward_apply_kernel[(rows * splits,)](
            dy, logits, tau, seed, row_ids, pivots, ids, logit_max, logit_sum, dlogprobs, partial, partial_dtau, out,
            *dy.stride(), *logits.stride(), *out.stride(), tau.stride(0),
            BLOCK_S=triton.next_power_of_2(splits), **options,
        )  # fmt: skip
        if partial_dtau is not None:
            sum_splits(partial_dtau, dtau)
    return dtau
